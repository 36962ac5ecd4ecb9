"""Whether what was written says the same as what it was made of: the same questions, greedily, token by token.

A reward model writes nothing; its scores of the same conversations are compared.
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
from engine.worker.generation.detokenizer import Wording
from engine.worker.generation.generator import Answer, Batch
from engine.worker.generation.sampling import Sampling
from engine.worker.generation.served_models import voice
from engine.worker.models.reward_model import scores
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.runtime.process_lifecycle import Report
from engine.worker.templates.conversations import Conversations

MOST = 64  # tokens of an answer
LONGEST = 2_000  # characters of a prompt
DEMO = ("identity", "alpaca_translate_zh")
ALIKE = 1e-3  # scores are equal up to this share: a batch is summed in another order


@dataclass(frozen=True)
class Prompt:
    """A question, with the answer of the data behind it where a score is wanted; `source` is where it is from."""

    source: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """What a model made of a prompt: tokens with how the answer ended, or a score."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str = ""
    score: float | None = None


def prompts_of(spec: ExportSpec, sources: Sources) -> list[Prompt]:
    """The own ones, then rows of the data that the runs learned from and demo ones in turn, each once."""
    own = [Prompt("own", [{"role": "user", "content": text}]) for text in spec.prompts]
    lists = [
        _rows(Path(training.data.dataset_dir), name)
        for _, training in sources.trainings
        for name in training.data.datasets
    ] + [_rows(PROJECT / "data", name) for name in DEMO]
    found: dict[str, Prompt] = {}
    while lists and len(found) < spec.check_prompts:
        for rows in list(lists):
            prompt = next(rows, None)
            if prompt is None:
                lists.remove(rows)
            elif len(found) < spec.check_prompts:
                found.setdefault(repr(prompt.messages), prompt)
    return own + list(found.values())


def _rows(folder: Path, name: str) -> Iterator[Prompt]:
    """The first rows of a data set as questions; none where it is gone, or is running text."""
    try:
        dataset = find(folder, name)
        for row in islice(examples(dataset, lambda _bad: None), 1000):
            messages = [*row.get("messages", ()), *row.get("chosen", ())]
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            if answered and len(repr(messages)) < LONGEST and not row.get("tools"):
                yield Prompt(name, messages)
    except (Refusal, OSError):
        return


def answers(
    model: Any, stage: str, folder: Path, prompts: Sequence[Prompt], report: Report
) -> list[Said | None]:
    """What the model says to each prompt, written with the tokenizer and template in `folder`; None where the template
    cannot write it."""
    if not prompts:
        return []
    return (_scores if stage == "rm" else _written)(model, folder, prompts, report)


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens, None where the template cannot write one; what ends an answer; and the words of tokens."""

    ids: list[list[int] | None]
    ends: frozenset[int]
    words: Any


def prompt_ids(folder: Path, prompts: Sequence[Prompt], model: Any = None) -> Prompts:
    """The prompts as the tokenizer and template in `folder` write them; `model` says what else ends its answers."""
    asked = [
        one.messages[:-1] if one.messages[-1]["role"] == "assistant" else one.messages for one in prompts
    ]
    tokenizer = load_tokenizer(RunSpec(), str(folder))
    if tokenizer.chat_template:
        speaking = voice("", str(folder), RunSpec(), model, adapter=False)
        return Prompts([_prompt(speaking, one) for one in asked], speaking.ends, speaking.words)
    # A base model that only goes on with a text.
    ids = [tokenizer(one[-1]["content"])["input_ids"] for one in asked]
    return Prompts(ids, frozenset({tokenizer.eos_token_id}), tokenizer.backend_tokenizer)


def _written(model: Any, folder: Path, prompts: Sequence[Prompt], report: Report) -> list[Said | None]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    asked = prompt_ids(folder, prompts, inner)
    ids, ends, words = asked.ids, asked.ends, asked.words
    wanted = [
        one and Answer(None, one, MOST, ends, Sampling(), Wording(words), lambda _: None) for one in ids
    ]
    batch, waiting = Batch(inner, None), [one for one in wanted if one]
    with torch.inference_mode():
        while waiting or batch.rows:
            while waiting and batch.has_room():
                batch.join(waiting.pop(0))
            if batch.rows:
                batch.step()
            report("exporting", sum(bool(one and one.finish) for one in wanted), len(prompts), "prompts")
    return [
        one and Said(words.decode(one.written, skip_special_tokens=True), tuple(one.written), one.finish)
        for one in wanted
    ]


def _prompt(speaking: Any, messages: list[dict[str, Any]]) -> list[int] | None:
    try:
        return speaking.prompt(messages)
    except Refusal:
        return None


def _scores(model: Any, folder: Path, prompts: Sequence[Prompt], report: Report) -> list[Said | None]:
    tokenizer = load_tokenizer(RunSpec(), str(folder))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    told = Conversations(tokenizer).encode([{"messages": one.messages, "tools": None} for one in prompts])
    known = [one for one in told if not isinstance(one, Problem) and one.answers]
    with torch.inference_mode():
        found = iter(scores(model, [one.ids[: one.answers[-1][1]].tolist() for one in known]).tolist())
    report("exporting", len(prompts), len(prompts), "prompts")
    return [
        None
        if isinstance(one, Problem) or not one.answers
        else Said(f"{(score := next(found)):.4f}", score=score)
        for one in told
    ]


def compared(
    spec: ExportSpec, prompts: Sequence[Prompt], before: Sequence[Said | None], after: Sequence[Said | None]
) -> dict[str, Any]:
    """The content of comparison.json: how many are equal, and each with both answers and the first token that differs."""
    rows = []
    for prompt, one, other in zip(prompts, before, after, strict=True):
        if one and other:
            at = _first_difference(one, other)
            question = next((m["content"] for m in reversed(prompt.messages) if m["role"] == "user"), "")
            rows.append({
                "source": prompt.source, "prompt": question, "before": one.text, "after": other.text,
                "equal": at is None, "differs_at": at, "tokens": len(one.tokens),
                # What a GGUF file is compared with later.
                "messages": prompt.messages, "answer": {"tokens": other.tokens, "finish": other.finish},
            })  # fmt: skip
    return {
        "precision": spec.precision, "quantize": spec.quantize, "most_tokens": MOST, "prompts": len(rows),
        "equal": sum(row["equal"] for row in rows), "rows": rows,
    }  # fmt: skip


def _first_difference(one: Said, other: Said) -> int | None:
    """The number of the first token that differs, from 0; None if nothing does. Of scores 0 stands for "differ"."""
    if one.score is not None and other.score is not None:
        return None if abs(one.score - other.score) <= ALIKE * max(1, abs(one.score)) else 0
    ours, theirs = (*one.tokens, one.finish), (*other.tokens, other.finish)
    differ = (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(differ, None)
