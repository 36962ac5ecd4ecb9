"""The served models by name: a base, and each adapter of it with the tokenizer, template and settings of its run.

A served model turns a conversation into the tokens of a prompt, and knows what ends its answers and its default
sampling. All of this comes from the folder of the result, so that it is the same wherever the result is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from engine.core.problems import Problem, Refusal, problem
from engine.data.images import decode
from engine.models.processor_files import has_image_processor
from engine.spec.run_spec import RunSpec
from engine.worker.generation.reasoning_marks import prompt_opens_reasoning, with_visible_marks
from engine.worker.generation.sampling import Sampling
from engine.worker.models.processor import image_tokens_or_problem
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.templates.chat_template import ids_of_tokens
from engine.worker.templates.conversations import NO_IMAGES, ConversationEncoder
from engine.worker.templates.image_tokens import ImageTokens
from engine.worker.templates.tool_calls import CallPrefix, ToolCallFormat

THINKING_SWITCH = "enable_thinking"  # common names of the switch in templates of reasoning models


@dataclass
class ServedModel:
    """`adapter` is the folder of its adapter, None for the base. `unthinking` renders without reasoning, if the
    template has the switch. `calls` finds tool calls in its answers, if its template shows how it writes them."""

    name: str
    adapter: str | None
    conversations: ConversationEncoder
    unthinking: ConversationEncoder | None
    calls: ToolCallFormat | None
    config: GenerationConfig
    stop_token_ids: frozenset[int]
    context: int | None  # tokens
    images: ImageTokens | Problem = NO_IMAGES  # the model's image tokens, or the reason why it has none

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.conversations.tokenizer

    @cached_property
    def backend_tokenizer(self) -> Tokenizer:
        """For the texts of answers."""
        return with_visible_marks(self.tokenizer.backend_tokenizer)

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        thinking: bool = True,
        begun: str = "",
    ) -> list[int]:
        """The tokens that precede the answer, including its own beginning if that is `begun`. A control token in a
        message stays text. Raises Refusal if the template cannot render the conversation, does not support the given
        tools, or if no answer fits after it."""
        # The thinking of a begun answer is already over.
        conversations = self.conversations if thinking or begun or not self.unthinking else self.unthinking
        rows = [{"messages": list(messages), "tools": tools or None}]
        if tools:
            rows.append({"messages": list(messages), "tools": None})
        encoded, *without_tools = conversations.encode(rows, add_generation_prompt=True)
        if isinstance(encoded, Problem):
            raise Refusal(encoded)
        for plain in without_tools:
            if not isinstance(plain, Problem) and plain.ids.tolist() == encoded.ids.tolist():
                raise Refusal(problem("chat-no-tools", voice=self.name))
        ids = encoded.ids.tolist() + self.tokenizer(begun, add_special_tokens=False)["input_ids"]
        if self.context and len(ids) >= self.context:
            raise Refusal(problem("chat-too-long", tokens=len(ids), context=self.context, voice=self.name))
        return ids

    def opens_reasoning(self, prompt: list[int]) -> bool:
        """Whether these tokens end with the mark that opens reasoning, so that an answer begins within it."""
        return prompt_opens_reasoning(self.tokenizer, prompt)

    def image_inputs(self, messages: Sequence[dict[str, Any]], ids: list[int]) -> Callable[[], dict[str, Any]] | None:
        """A function that creates the image arguments of the forward pass for a prompt with these tokens; None without
        images. Calling it raises Refusal for an image that cannot be decoded."""
        sources = [image for message in messages for image in message.get("images", ())]
        images = self.images
        if not sources or isinstance(images, Problem):
            return None

        def made() -> dict[str, Any]:
            pixels = images.pixels([[decode(source) for source in sources]])
            return pixels | images.token_types(torch.tensor([ids]))

        return made

    def begun(self, call: str | None) -> CallPrefix:
        """The beginning of an answer that has to be a `call` of the tool with that name, or of any tool if it is "".
        Raises Refusal if the template does not show how a call begins."""
        if call is None:
            return CallPrefix("", "")
        opened = self.calls.forced_call(call) if self.calls else None
        if opened is None:
            raise Refusal(problem("chat-no-call", voice=self.name))
        return opened

    def sampling(self, settings: dict[str, Any]) -> Sampling:
        """The `settings` that are not None; for the others, those of the model's own generation config."""
        own = self.config
        defaults = {
            "temperature": (1.0 if own.temperature is None else own.temperature) if own.do_sample else 0.0,
            "top_p": own.top_p,
            "top_k": own.top_k,
            "repetition_penalty": own.repetition_penalty,
        }
        chosen = {name: value for name, value in {**defaults, **settings}.items() if value is not None}
        return Sampling(**chosen)


def load_served_model(
    name: str,
    folder: str,
    spec: RunSpec,
    model: PreTrainedModel,
    adapter: bool,
    fallback: ServedModel | None = None,
) -> ServedModel:
    """The model whose tokenizer and settings are in `folder`. A base without a chat template uses that of `fallback`,
    so that it can be compared with its adapters. Raises Refusal if there is no usable template."""
    tokenizer = load_tokenizer(spec, folder)
    if not tokenizer.chat_template and fallback:
        tokenizer = fallback.tokenizer
    if not tokenizer.chat_template:
        raise Refusal(problem("chat-no-template", model=name))
    template = tokenizer.get_chat_template()
    # vLLM has the model elsewhere, and is given no images.
    base = str(getattr(model, "name_or_path", folder)) if adapter else folder
    files = folder if has_image_processor(Path(folder)) else base
    images = image_tokens_or_problem(base, tokenizer, remote_code=spec.model.trust_remote_code, files=files)
    conversations = ConversationEncoder(tokenizer, images=images)
    unthinking = None
    if THINKING_SWITCH in template:
        without_thoughts = f"{{%- set {THINKING_SWITCH} = false -%}}{template}"
        unthinking = ConversationEncoder(tokenizer, without_thoughts, images=images)
    if (Path(folder) / "generation_config.json").exists():
        config = GenerationConfig.from_pretrained(folder)
    else:
        config = model.generation_config
    ends = config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else ends
    turns = ids_of_tokens(tokenizer, conversations.end_tokens)
    return ServedModel(
        name=name,
        adapter=folder if adapter else None,
        conversations=conversations,
        unthinking=unthinking,
        calls=ToolCallFormat.of(tokenizer, template),
        config=config,
        stop_token_ids=frozenset([*known, *turns]),
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        images=images,
    )
