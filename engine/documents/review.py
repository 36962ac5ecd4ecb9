"""The review of a draft: its rows with what has been decided about them, and new decisions.

Decisions are lines that are only ever appended, so nothing is lost when a page or a process ends, and the last one
about a row counts. An edited row keeps what the model wrote in rows.jsonl.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from engine.core.locks import wait_for_lock
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import append_lines, read_lines
from engine.documents.answers import MAX_TEXT
from engine.documents.drafts import Draft
from engine.documents.passages import Passage
from engine.documents.repetitions import Repetition, read_repetitions, write_repetitions
from engine.documents.support import support

Decision = Literal["", "accepted", "rejected"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
DECISIONS_FILE = "decisions.jsonl"
LOW_SCORE, LOW_SUPPORT = 3, 0.6  # a row with less is worth a second look, and so is one with a number of its own


@dataclass(frozen=True)
class DraftRow:
    """A row of a draft. `support` and `missing`: see `engine.documents.support`; `score`: the model's own, from 1 to 5,
    None if it gave none; `repetition`: the earlier row that it is like."""

    id: str
    passage: Passage
    question: str
    answer: str
    support: float
    missing: tuple[str, ...]
    score: int | None
    reason: str
    repetition: Repetition | None = None
    decision: Decision = ""
    edited: bool = False

    @property
    def low(self) -> bool:
        """Whether a measure speaks against it."""
        return self.support < LOW_SUPPORT or bool(self.missing) or (self.score is not None and self.score < LOW_SCORE)


FILTERS: dict[str, Callable[[DraftRow], bool]] = {
    "open": lambda row: not row.decision and not row.repetition,
    "accepted": lambda row: row.decision == "accepted",
    "rejected": lambda row: row.decision == "rejected",
    "low": lambda row: row.low and not row.repetition,
    "repeated": lambda row: row.repetition is not None,
    "all": lambda row: True,
}


def rows_of(draft: Draft) -> list[DraftRow]:
    """All rows in the order of their passages, as they have been edited and decided."""
    passages = {passage.number: passage for passage in draft.passages()}
    repetitions = read_repetitions(draft)
    decisions: dict[str, dict[str, Any]] = {}
    for line in read_lines(draft.path / DECISIONS_FILE):  # a later one has the decision, and not always texts
        decisions.setdefault(str(line.get("row")), {}).update(line)
    records = draft.records()
    return [
        _decided(_row(row, passages[number], repetitions.get(row["id"])), decisions.get(row["id"]))
        for number in sorted(records)
        for row in records[number]["rows"]
        if number in passages
    ]


def _row(row: Mapping[str, Any], passage: Passage, repetition: Repetition | None) -> DraftRow:
    return DraftRow(
        row["id"],
        passage,
        row["question"],
        row["answer"],
        row["support"],
        tuple(row["missing"]),
        row["score"],
        row.get("reason", ""),
        repetition,
    )


def _decided(row: DraftRow, line: Mapping[str, Any] | None) -> DraftRow:
    """The row with the last decision about it; an edited answer is measured again, and the model's score is of
    another."""
    if line is None:
        return row
    row = replace(row, decision=line["decision"])
    question, answer = line.get("question", row.question), line.get("answer", row.answer)
    if (question, answer) == (row.question, row.answer):
        return row
    measure = support(answer, row.passage.text)
    texts = replace(row, question=question, answer=answer, edited=True, score=None, reason="")
    return replace(texts, support=measure.share, missing=measure.missing_numbers)


def decide(draft: Draft, rows: Sequence[DraftRow], decision: str, by: str) -> None:
    """Accept or reject rows, or take that back. Raises Refusal for another decision."""
    if decision not in DECISIONS:
        raise Refusal(problem("draft-decision", decision=decision[:40], known="accepted, rejected"))
    _append(draft, (_line(row, decision, by) for row in rows))


def edit(draft: Draft, row: DraftRow, question: str, answer: str, by: str) -> None:
    """Replace a row's question and answer, and accept it. Raises Refusal if one is empty or too long."""
    question, answer = question.strip(), answer.strip()
    if not question or not answer:
        raise Refusal(problem("draft-row-empty", row=row.id))
    if (longest := max(len(question), len(answer))) > MAX_TEXT:
        raise Refusal(problem("draft-row-long", row=row.id, characters=f"{longest:,}", limit=f"{MAX_TEXT:,}"))
    _append(draft, [_line(row, "accepted", by) | {"question": question, "answer": answer}])


def _line(row: DraftRow, decision: str, by: str) -> dict[str, Any]:
    return {"row": row.id, "decision": decision, "by": by, "at": round(time.time(), 3)}


def _append(draft: Draft, lines: Iterable[Mapping[str, Any]]) -> None:
    try:
        lock = wait_for_lock(draft.path / f"{DECISIONS_FILE}.lock")
        try:
            append_lines(draft.path / DECISIONS_FILE, lines)
        finally:
            os.close(lock)
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=draft.path, why=error.strerror or error)) from error


def find_row(rows: Sequence[DraftRow], id: str) -> DraftRow:
    """The row with that id. Raises Refusal if there is none."""
    row = next((row for row in rows if row.id == id), None)
    if row is None:
        raise Refusal(problem("draft-row-unknown", row=str(id)[:40] or "—"))
    return row


def accept_supported(draft: Draft, least: float, by: str) -> int:
    """Accept the open rows that have at least so much support, and no number of their own, after looking for
    repetitions among the rows of now; returns how many. Raises Refusal for a share that is none."""
    if not 0 <= least <= 1:
        raise Refusal(problem("draft-support", given=least))
    write_repetitions(draft)
    rows = [row for row in rows_of(draft) if FILTERS["open"](row) and row.support >= least and not row.missing]
    decide(draft, rows, "accepted", by)
    return len(rows)


@dataclass(frozen=True)
class Counts:
    """How many passages the model has been asked about and what came of it, and how far the review is.

    `unread`: answers in which no row could be read, with `example`; `refused`: passages about which it gave no answer,
    with `problem`, the first reason; `unjudged`: rows whose score could not be read; `cut_off`: answers that reached
    their maximum length, whose incomplete rows are left out; `dropped`: other rows that were left out, by reason, as in
    `answers.Dropped`.
    """

    passages: int
    asked: int
    rows: int
    by_filter: Mapping[str, int]
    unread: int
    example: str
    refused: int
    problem: Problem | None
    unjudged: int
    cut_off: int
    dropped: Mapping[str, int]


def counts_of(draft: Draft, rows: Sequence[DraftRow]) -> Counts:
    """Everything that a draft's head shows."""
    records = list(draft.records().values())
    unread = [record["unread"] for record in records if "unread" in record]
    refused = [record["problem"] for record in records if "problem" in record]
    unjudged = sum(row["score"] is None for record in records for row in record["rows"])
    by_filter = Counter({name: sum(map(fits, rows)) for name, fits in FILTERS.items()})
    first = Problem(refused[0]["code"], refused[0]["field"], refused[0]["values"]) if refused else None
    example = next(iter(unread), "")
    passages = sum(facts.get("passages", 0) for facts in draft.reading)
    cut_off = sum(record.get("finish") == "length" for record in records)
    dropped = sum((Counter(record.get("dropped", {})) for record in records), Counter[str]())
    return Counts(
        passages,
        len(records),
        len(rows),
        by_filter,
        len(unread),
        example,
        len(refused),
        first,
        unjudged,
        cut_off,
        dropped,
    )
