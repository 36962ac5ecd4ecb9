"""Models under evaluation: a base and its adapters with one base in memory, their answers and their losses."""

from __future__ import annotations

import gc
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from engine.core.problems import Problem, Refusal, problem
from engine.data.images import decode
from engine.evaluation.evaluation_memory import MAX_LOGITS
from engine.evaluation.evaluation_settings import Generation
from engine.spec.model_settings import Model
from engine.spec.run_spec import RunSpec
from engine.worker.data.examples import IGNORE_INDEX, Encoder, Example
from engine.worker.evaluation.questions import Question
from engine.worker.generation.answer import Answer, Piece
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.generator import Generator
from engine.worker.generation.sampling import Sampling
from engine.worker.generation.served_models import ServedModel, load_served_model
from engine.worker.models.loading import DTYPES, load_base, precision
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.templates.conversations import NO_IMAGES
from engine.worker.templates.image_tokens import ImageTokens, placed_inputs

DEFAULT_CONTEXT = 1 << 20  # tokens, for a model whose config has no limit
SAMPLE_SEEDS = 1_000_003  # between those of a row's first and second answer


class Reply(NamedTuple):
    """One answer: its text, number of tokens, and whether it ended by itself. `opened`: it begins within reasoning that
    the prompt opened. `problem`: why there is none."""

    text: str = ""
    tokens: int = 0
    ended: bool = False
    opened: bool = False
    problem: Problem | None = None


@dataclass
class LoadedModels:
    """A model in memory with its adapters. Call `end` before the next is loaded.

    `settings` is how the model in `path` was loaded; `adapters` are folders by name, and `base` is the name of the
    model itself, if it is evaluated.
    """

    generator: Generator
    settings: RunSpec
    path: str
    adapters: dict[str, str]
    base: str | None

    @classmethod
    def load(
        cls, model: Model, path: str, adapters: dict[str, str], base: str | None, max_batch_size: int
    ) -> LoadedModels:
        """The model in `path`, loaded as `model` says, with its `adapters`."""
        own = RunSpec.read({"model": model.model_dump()})
        loaded = load_base(own, path, DTYPES[precision(own)], adapters.values()).requires_grad_(False).eval()
        models = cls(Generator(loaded, max_batch_size), own, path, adapters, base)
        for folder in adapters.values():
            models.generator.call(partial(models.generator.load_adapter, folder)).result()
        return models

    @property
    def adapter_settings(self) -> RunSpec:
        """How the tokenizer of an adapter is loaded: it includes the template of its run."""
        return self.settings.change("model.chat_template", None)

    @cached_property
    def models(self) -> dict[str, ServedModel]:
        """The base and adapters by name, ready to answer. Raises Refusal if one of them cannot be prompted."""
        model = self.generator.model
        models = {
            name: load_served_model(name, folder, self.adapter_settings, model, adapter=True)
            for name, folder in self.adapters.items()
        }
        if self.base:
            fallback = next(iter(models.values()), None)
            models[self.base] = load_served_model(
                self.base, self.path, self.settings, model, adapter=False, fallback=fallback
            )
        return models

    def tokenizer(self, name: str) -> PreTrainedTokenizerFast:
        """A new tokenizer of a model by name. As in `models`, a base without a template has the tokenizer of its first
        adapter."""
        if name in self.adapters:
            return load_tokenizer(self.adapter_settings, self.adapters[name])
        own = load_tokenizer(self.settings, self.path)
        if own.chat_template or not self.adapters:
            return own
        return self.tokenizer(next(iter(self.adapters)))

    def with_model(self, name: str, act: Callable[[], Any]) -> Any:
        """The result of `act`, called by the generating thread while the model called `name` is active."""

        def acted() -> Any:
            self.generator.use(self.adapters.get(name))
            return act()

        return self.generator.call(acted).result()

    def end(self) -> None:
        """Free the memory."""
        self.generator.end()
        self.__dict__.pop("models", None)
        self.generator.adapted = None
        del self.generator.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(
        self, name: str, questions: Sequence[Question], how: Generation, sample: int = 0
    ) -> Iterator[tuple[Question, Reply]]:
        """The answers of the model called `name`, as they come in; `sample`: which of several to each row. Raises
        Refusal if memory is insufficient."""
        model, arrived, pending = self.models[name], queue.SimpleQueue[tuple[Question, Reply]](), []
        for question in questions:
            try:
                prompt = model.prompt(question.messages, question.tools, thinking=how.thinking)
                if not prompt:
                    raise Refusal(problem("evaluate-empty-prompt", name=name))
            except Refusal as refusal:
                arrived.put((question, Reply(problem=refusal.problems[0])))
                continue
            room = model.context - len(prompt) if model.context else DEFAULT_CONTEXT
            pending.append(
                Answer(
                    adapter=model.adapter,
                    prompt=prompt,
                    max_tokens=min(how.max_new_tokens, room),
                    stop_token_ids=model.stop_token_ids,
                    sampling=Sampling(how.temperature, how.top_p, seed=how.seed + question.row + sample * SAMPLE_SEEDS),
                    detokenizer=Detokenizer(model.backend_tokenizer),
                    on_piece=_collector(question, model.opens_reasoning(prompt), arrived.put),
                    image_inputs=model.image_inputs(question.messages, prompt),
                )
            )
        self.generator.submit_all(pending)
        for _ in questions:
            question, reply = arrived.get()
            if reply.problem and reply.problem.code in ("chat-memory", "chat-error"):
                raise Refusal(reply.problem)
            yield question, reply

    def losses(self, name: str, questions: Sequence[Question]) -> Iterator[list[tuple[Question, float, int]]]:
        """For rows with an answer: the sum of −log p over the tokens that training would learn, and their number; 0 of
        0 if there is nothing to learn, or the row exceeds the model's context."""
        model = self.models[name]
        # What is too long is left out, not truncated: half an answer is a different answer.
        context = model.context or DEFAULT_CONTEXT
        encoder = Encoder(model.tokenizer, "chat", context, too_long="drop", images=model.images)
        answered = [question.chat for question in questions if question.chat is not None]
        examples = list(zip(questions, encoder.examples(answered), strict=True))
        examples.sort(key=lambda pair: len(pair[1].values[0]))
        for batch in _batches(examples, self.generator.model.config.get_text_config().vocab_size):
            rows = [example for _, example in batch]
            batch_losses = self.with_model(name, partial(losses, self.generator.model, rows, model.images))
            yield [(question, *loss) for (question, _), loss in zip(batch, batch_losses, strict=True)]


def _collector(
    question: Question, opened: bool, put: Callable[[tuple[Question, Reply]], None]
) -> Callable[[Piece], None]:
    texts: list[str] = []

    def on_piece(piece: Piece) -> None:
        texts.append(piece.text)
        if piece.finish:
            put((question, Reply("".join(texts), piece.count, piece.finish == "stop", opened, piece.problem)))

    return on_piece


def _batches(examples: Sequence[Any], vocabulary: int) -> Iterator[list[Any]]:
    """Batches of neighbours, as many as fit the limit for the logits of a forward pass."""
    batch: list[Any] = []
    for pair in examples:
        longest = max(len(pair[1].values[0]), 1)  # the examples are ordered by length
        if batch and (len(batch) + 1) * longest * vocabulary > MAX_LOGITS:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


@torch.inference_mode()
def losses(
    model: Any, examples: Sequence[Example], images: ImageTokens | Problem = NO_IMAGES
) -> list[tuple[float, int]]:
    """For each example the sum of −log p of its trained tokens, in fp32, and their number."""
    nonempty = [example for example in examples if len(example.values[0])]
    summed = iter(_summed_losses(model, nonempty, images) if nonempty else [])
    return [next(summed) if len(example.values[0]) else (0.0, 0) for example in examples]


def _summed_losses(model: Any, examples: Sequence[Example], images: ImageTokens | Problem) -> list[tuple[float, int]]:
    ids = [torch.from_numpy(example.values[0].astype("int64")) for example in examples]
    labels = [_labels(example, row_ids) for example, row_ids in zip(examples, ids, strict=True)]
    padded = pad_sequence(ids, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(row_ids) for row_ids in ids], batch_first=True).to(model.device)
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
    # Logits only where a counted token follows: for a long question with a short answer, hardly any are needed.
    places = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(-1)
    if not len(places):
        return [(0.0, 0)] * len(examples)
    seen = _image_inputs(model, padded, examples, images)
    logits = model(
        input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=places.to(model.device), **seen
    ).logits
    targets = targets[:, places].to(model.device)
    # A base next to an adapter with its own embeddings has no probability for the adapter's new tokens.
    unknown = (targets >= logits.shape[-1]).any(1, keepdim=True)
    targets = targets.masked_fill(unknown, IGNORE_INDEX)
    token_losses = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    sums, counts = token_losses.double().sum(1).tolist(), (targets != IGNORE_INDEX).sum(1).tolist()
    return list(zip(sums, counts, strict=True))


def _image_inputs(
    model: Any, ids: Tensor, examples: Sequence[Example], images: ImageTokens | Problem
) -> dict[str, Tensor]:
    """The image arguments of the forward pass for a batch."""
    sources = [example.images for example in examples if example.images]
    if not sources or isinstance(images, Problem):
        return {}
    inputs = images.pixels([[decode(source) for source in own] for own in sources]) | images.token_types(ids)
    return placed_inputs(inputs, model)


def _labels(example: Example, ids: Tensor) -> Tensor:
    labels = torch.full_like(ids, IGNORE_INDEX)
    for begin, end in example.trained:
        labels[begin:end] = ids[begin:end]
    return labels
