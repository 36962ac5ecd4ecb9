"""What a template writes for one order of speakers, as text and, if contents can be tokenized separately, as ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from engine.worker.templates.answer_spans import Answers
from engine.worker.templates.chat_template import Span
from engine.worker.templates.template_tracing import Check


@dataclass(eq=False)
class TemplateShape:
    """What the template writes for one order of speakers: its own texts and, as numbers, the contents.

    `answers` are spans of parts, and no answer begins or ends within a part. `is_ended`: the last one has an end token.
    `lost`: what the template leaves out of such conversations. `plan` is present if the contents can be tokenized
    separately from the frame.
    """

    parts: tuple[str | int, ...]
    checks: tuple[Check, ...]
    answers: tuple[Span, ...]
    is_ended: bool = True
    lost: tuple[str, ...] = ()
    plan: TokenPlan | None = None
    proven: bool = False

    def text(self, contents: Sequence[str]) -> tuple[str, Answers] | None:
        """The rendered conversation and its answers; None if the template has to be run."""
        if not all([check(contents[number]) for number, check in self.checks]):
            return None
        written = [contents[part] if isinstance(part, int) else part for part in self.parts]
        at = [0, *accumulate(map(len, written))]
        spans = [(at[begin], at[end]) for begin, end in self.answers]
        return "".join(written), Answers(spans, self.is_ended, self.lost)


@dataclass(eq=False)
class TokenPlan:
    """How the ids of a shape are assembled, part by part."""

    frame: np.ndarray  # the ids of the template's own texts, one after another
    parts: tuple[Span | int, ...]  # where in `frame`; for a content, the number of its slot
    slots: tuple[int, ...]  # which content goes where
    edges: tuple[tuple[int, EdgeCheck, EdgeCheck], ...]  # of each slot: its content, and how that may begin and end

    def takes(self, contents: Sequence[str]) -> bool:
        for number, first, last in self.edges:
            content = contents[number]
            if not content or not first[content[0]] or not last[content[-1]]:
                return False
        return True


class EdgeCheck(dict[str, bool]):
    """Character → whether a content that begins (or ends) with it is tokenized as if it were alone. Tested once."""

    def __init__(self, ask: Callable[[str], bool]):
        self.ask = ask

    def __missing__(self, character: str) -> bool:
        self[character] = known = self.ask(character)
        return known


class TokenizedGroup(NamedTuple):
    """Conversations of one shape: their numbers, the ids of all, where each begins and ends, and its answers."""

    shape: TemplateShape
    rows: list[int]
    ids: np.ndarray
    bounds: list[int]
    answers: list[tuple[Span, ...]]


def assembled(
    shape: TemplateShape, plan: TokenPlan, rows: list[int], ids: np.ndarray, lengths: np.ndarray
) -> TokenizedGroup:
    """Puts contents into their frames, by the plan of their shape."""
    count = len(rows)
    begins = (lengths.cumsum() - lengths + len(plan.frame)).reshape(count, -1)
    lengths = lengths.reshape(count, -1)
    begin, length = (np.empty((count, len(plan.parts)), dtype=np.int64) for _ in range(2))
    for at, part in enumerate(plan.parts):
        if isinstance(part, int):
            begin[:, at], length[:, at] = begins[:, part], lengths[:, part]
        else:
            begin[:, at], length[:, at] = part[0], part[1] - part[0]
    ends = length.cumsum(axis=1)
    bounds = np.concatenate([[0], ends[:, -1].cumsum()])
    answers = [
        zip((ends[:, first] - length[:, first]).tolist(), ends[:, last - 1].tolist(), strict=True)
        for first, last in shape.answers
    ]
    spans = list(zip(*answers, strict=True)) if answers else [()] * count
    return TokenizedGroup(
        shape,
        rows,
        gather_ranges(np.concatenate([plan.frame, ids]), begin.ravel(), length.ravel()),
        bounds.tolist(),
        spans,
    )


def gather_ranges(source: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Parts of `source`, one after another."""
    before = lengths.cumsum() - lengths
    return source[np.arange(lengths.sum()) + np.repeat(begins - before, lengths)]
