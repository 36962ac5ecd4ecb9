"""Compare the answers before and after an export: the same questions, greedily, token by token.

For a reward model, which generates nothing, its scores of the same conversations are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from engine.core.problems import Problem, Refusal
from engine.data.datasets import examples, find
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import RunSpec
from engine.worker.exporting.base_model import Sources
from engine.worker.generation.answer import Answer
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.generator import Batch
from engine.worker.generation.sampling import Sampling
from engine.worker.generation.served_models import load_served_model
from engine.worker.models.reward_model import score_conversations
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.runtime.process_lifecycle import ProgressReport
from engine.worker.templates.conversations import ConversationEncoder

MAX_ANSWER_TOKENS = 64
MAX_PROMPT_CHARS = 2_000
DEMO_DATASETS = ("identity", "alpaca_translate_zh")
SCORE_TOLERANCE = 1e-3  # scores are equal up to this relative difference: a batch is summed in another order


@dataclass(frozen=True)
class Prompt:
    """A question, followed by the answer in the data if a score is compared; `source` is where it comes from."""

    source: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class ModelOutput:
    """A model's result for a prompt: tokens and how the answer ended, or a score."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str = ""
    score: float | None = None


def prompts_of(spec: ExportSpec, sources: Sources) -> list[Prompt]:
    """The prompts of the spec, then rows of the trainings' data sets and of the demo data in turn, without
    duplicates."""
    own = [Prompt("own", [{"role": "user", "content": text}]) for text in spec.prompts]
    lists = [
        _rows(Path(training.data.dataset_dir), name)
        for _, training in sources.trainings
        for name in training.data.datasets
    ] + [_rows(PROJECT / "data", name) for name in DEMO_DATASETS]
    prompts: dict[str, Prompt] = {}
    while lists and len(prompts) < spec.check_prompts:
        for rows in list(lists):
            prompt = next(rows, None)
            if prompt is None:
                lists.remove(rows)
            elif len(prompts) < spec.check_prompts:
                prompts.setdefault(repr(prompt.messages), prompt)
    return own + list(prompts.values())


def _rows(folder: Path, name: str) -> Iterator[Prompt]:
    """The first rows of a data set as questions; none if it no longer exists, or is plain text."""
    try:
        dataset = find(folder, name)
        for row in islice(examples(dataset, lambda _bad: None), 1000):
            messages = [*row.get("messages", ()), *row.get("chosen", ())]
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            if answered and len(repr(messages)) < MAX_PROMPT_CHARS and not row.get("tools"):
                yield Prompt(name, messages)
    except (Refusal, OSError):
        return


def model_outputs(
    model: Any, stage: str, folder: Path, prompts: Sequence[Prompt], report: ProgressReport
) -> list[ModelOutput | None]:
    """The model's result for each prompt, rendered with the tokenizer and template in `folder`; None if the template
    cannot render it."""
    if not prompts:
        return []
    return (_reward_scores if stage == "rm" else _generate)(model, folder, prompts, report)


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as tokens, None if the template cannot render one; the tokens that end an answer; and the tokenizer."""

    ids: list[list[int] | None]
    stop_token_ids: frozenset[int]
    tokenizer: Any


def prompt_ids(folder: Path, prompts: Sequence[Prompt], model: Any = None) -> EncodedPrompts:
    """The prompts as rendered by the tokenizer and template in `folder`; `model` says what else ends its answers."""
    conversations = [
        prompt.messages[:-1] if prompt.messages[-1]["role"] == "assistant" else prompt.messages for prompt in prompts
    ]
    tokenizer = load_tokenizer(RunSpec(), str(folder))
    if tokenizer.chat_template:
        served = load_served_model("", str(folder), RunSpec(), model, adapter=False)
        return EncodedPrompts(
            [_prompt(served, conversation) for conversation in conversations],
            served.stop_token_ids,
            served.backend_tokenizer,
        )
    # A base model that only continues a text.
    ids = [tokenizer(conversation[-1]["content"])["input_ids"] for conversation in conversations]
    return EncodedPrompts(ids, frozenset({tokenizer.eos_token_id}), tokenizer.backend_tokenizer)


def _generate(model: Any, folder: Path, prompts: Sequence[Prompt], report: ProgressReport) -> list[ModelOutput | None]:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    encoded = prompt_ids(folder, prompts, inner)
    ids, stop_token_ids, tokenizer = encoded.ids, encoded.stop_token_ids, encoded.tokenizer
    answers = [
        Answer(
            None,
            prompt,
            MAX_ANSWER_TOKENS,
            stop_token_ids,
            Sampling(),
            Detokenizer(tokenizer),
            lambda _: None,
        )
        if prompt
        else None
        for prompt in ids
    ]
    batch, waiting = Batch(inner, None), [answer for answer in answers if answer]
    with torch.inference_mode():
        while waiting or batch.rows:
            while waiting and batch.has_room():
                batch.join(waiting.pop(0))
            if batch.rows:
                batch.step()
            report(
                "exporting",
                sum(bool(answer and answer.finish) for answer in answers),
                len(prompts),
                "prompts",
            )
    return [
        ModelOutput(tokenizer.decode(answer.written, skip_special_tokens=True), tuple(answer.written), answer.finish)
        if answer
        else None
        for answer in answers
    ]


def _prompt(served: Any, messages: list[dict[str, Any]]) -> list[int] | None:
    try:
        return served.prompt(messages)
    except Refusal:
        return None


def _reward_scores(
    model: Any, folder: Path, prompts: Sequence[Prompt], report: ProgressReport
) -> list[ModelOutput | None]:
    tokenizer = load_tokenizer(RunSpec(), str(folder))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    encoded = ConversationEncoder(tokenizer).encode(
        [{"messages": prompt.messages, "tools": None} for prompt in prompts]
    )
    complete = [row for row in encoded if not isinstance(row, Problem) and row.answers]
    with torch.inference_mode():
        scores = iter(score_conversations(model, [row.ids[: row.answers[-1][1]].tolist() for row in complete]).tolist())
    report("exporting", len(prompts), len(prompts), "prompts")
    return [
        None
        if isinstance(row, Problem) or not row.answers
        else ModelOutput(f"{(score := next(scores)):.4f}", score=score)
        for row in encoded
    ]


def compare_outputs(
    spec: ExportSpec,
    prompts: Sequence[Prompt],
    before: Sequence[ModelOutput | None],
    after: Sequence[ModelOutput | None],
) -> dict[str, Any]:
    """The content of comparison.json: how many are equal, and each with both answers and the first token that
    differs."""
    rows = []
    for prompt, expected, actual in zip(prompts, before, after, strict=True):
        if expected and actual:
            at = _first_difference(expected, actual)
            question = next((m["content"] for m in reversed(prompt.messages) if m["role"] == "user"), "")
            rows.append(
                {
                    "source": prompt.source,
                    "prompt": question,
                    "before": expected.text,
                    "after": actual.text,
                    "equal": at is None,
                    "differs_at": at,
                    "tokens": len(expected.tokens),
                    # A GGUF file is compared with this later.
                    "messages": prompt.messages,
                    "answer": {"tokens": actual.tokens, "finish": actual.finish},
                }
            )
    return {
        "precision": spec.precision,
        "quantize": spec.quantize,
        "most_tokens": MAX_ANSWER_TOKENS,
        "prompts": len(rows),
        "equal": sum(row["equal"] for row in rows),
        "rows": rows,
    }


def _first_difference(expected: ModelOutput, actual: ModelOutput) -> int | None:
    """The index of the first token that differs, from 0; None if they are equal. For scores, 0 means that they
    differ."""
    if expected.score is not None and actual.score is not None:
        return None if abs(expected.score - actual.score) <= SCORE_TOLERANCE * max(1, abs(expected.score)) else 0
    ours, theirs = (*expected.tokens, expected.finish), (*actual.tokens, actual.finish)
    differ = (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(differ, None)
