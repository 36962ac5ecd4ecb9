"""Judges a whole data set before anything is trained on it: every row that cannot be used, and what is odd about the rest.

One pass, one row in memory at a time; what is remembered of a row are some 24 bytes, for finding doubles. A problem
keeps a row from being trained on; a warning is something that a person would want to know and a run would not say.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import FITS, Form
from engine.data import row_files
from engine.data.columns import labels_among
from engine.data.datasets import Dataset, Example, canonical, entries, example, rows
from engine.data.loss_marks import ROW_MARKS
from engine.data.row_files import Place
from engine.data.soundness import flaw

COMPARED = 50_000_000  # rows of a set that are compared with each other
TELL_EVERY = 5_000  # rows
RECOMMENDED_AFTER = 100  # rows, of which one at least is good
RARE = 0.05  # a script that fewer answers are in than this share stands out
PLACEHOLDER = re.compile(r"\{\{\s*[\w.-]+\s*\}\}")
# What chat templates write between turns. A text that holds it was most likely rendered by a template already.
CONTROL = re.compile(
    r"<\|[\w-]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)
SCRIPTS = {
    "han": "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "kana": "\u3040-\u30ff", "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u052f", "arabic": "\u0600-\u06ff\u0750-\u077f", "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f", "greek": "\u0370-\u03ff", "hebrew": "\u0590-\u05ff", "latin": "A-Za-z\u00c0-\u024f",
}  # fmt: skip
RUNS = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in SCRIPTS.items()))
SCORE = re.compile(r"score|rating|reward", re.IGNORECASE)  # columns that an author may think are used
NAMED = 12  # columns that are told by name
LOOKED_AT = 120  # characters of an answer that tell its script

OnBad = Callable[[Place, Problem, Any], None]
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Report:
    """What `check` found: rows that can be used and not, the first problems and warnings, and how many of each.

    `counts`: code of a problem or warning → rows it was found in. `scripts`: writing system → answers in it.
    """

    good: int
    bad: int
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    scripts: Mapping[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.good > 0


def check(
    dataset: Dataset,
    form: Form,
    limit: int | None = None,
    catalogue: Sequence[Dataset] = (),
    most: int = 20,
    *,
    against: Iterable[Dataset] = (),
    on_bad: OnBad | None = None,
    on_rows: OnRows | None = None,
) -> Report:
    """Reads up to `limit` rows and reports which can be used for a stage that needs `form`.

    At most `most` problems, and `most` warnings of each sort, are kept; `bad` counts all. `catalogue` is where other
    data sets are recommended from, if this one is of the wrong kind. `against`: sets whose questions must not occur in
    this one, since they are measured on. `on_bad` is told every bad row, `on_rows` now and then how many were read.
    """
    if dataset.problem is None and dataset.kind not in FITS[form]:
        fitting = ", ".join(recommended(catalogue, form)) or "—"
        return Report(0, 0, (problem(f"kind-{form}-wanted", name=dataset.name, fitting=fitting),))
    good = bad = 0
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    read = dataset.read | ROW_MARKS
    try:
        doubts = _Doubts(most, {other.name: _questions(other) for other in against})
        for place, row in islice(entries(dataset), limit):
            if on_rows and (good + bad) % TELL_EVERY == 0:
                on_rows(good + bad)
            try:
                if isinstance(row, Problem):
                    raise Refusal(row)
                doubts.look(place, example(dataset, place, row, form))
                doubts.note_unread(row, read)
                good += 1
            except Refusal as refusal:
                (wrong,) = refusal.problems
                bad += 1
                counts[wrong.code] += 1
                if len(problems) < most:
                    problems.append(wrong)
                if on_bad:
                    on_bad(place, wrong, None if isinstance(row, Problem) else row)
    except Refusal as refusal:
        return Report(0, 0, tuple(refusal.problems))
    if not good and not bad:
        problems.append(problem("dataset-empty", name=dataset.name))
    of_files = _doubts_of_files(dataset)
    counts.update(doubt.code for doubt in of_files)
    warnings = (*of_files, *doubts.warnings(dataset))
    return Report(good, bad, tuple(problems), warnings, counts | doubts.counts, dict(doubts.scripts))


def _doubts_of_files(dataset: Dataset) -> list[Problem]:
    """What of the way in which its files are read is not certain."""
    doubts: list[Problem] = []
    for file in dataset.files:
        with contextlib.suppress(Refusal):  # that no row of it can be read is told as a problem
            doubts += row_files.source_of(file, dataset.encoding).doubts
    return doubts


def recommended(catalogue: Sequence[Dataset], form: Form) -> list[str]:
    """Names of the sound data sets that have a row of that form among their first ones."""
    return [dataset.name for dataset in catalogue if dataset.kind in FITS[form] and _has_row(dataset, form)]


def _has_row(dataset: Dataset, form: Form) -> bool:
    if flaw(dataset) or not dataset.files:
        return False
    return any(
        True for _ in canonical(dataset, islice(rows(dataset, _unheard), RECOMMENDED_AFTER), _unheard, form)
    )


def _unheard(_: Problem) -> None:
    """Nobody wants to know."""


# -------------------------------------------------------------------------------------------- warnings


class _Doubts:
    """What is odd about rows that can be used: looked for in each row, and at the end between them."""

    def __init__(self, most: int, questions: Mapping[str, Collection[int]]):
        self.most, self.questions = most, questions
        self.counts: Counter[str] = Counter()
        self.kept: list[Problem] = []
        self.scripts: Counter[str] = Counter()
        self.first_in: dict[str, list[Place]] = {}
        self.unread: dict[str, None] = {}  # columns that play no part, though something is in them
        self.rows = _Fingerprints()

    def look(self, place: Place, row: Example) -> None:
        for note in row.get("notes", ()):
            self._keep(note)
        if "weights" in row:
            weights = row["weights"]
            trained = sum(weight > 0 for weight in weights)
            listed = ", ".join(f"{weight:g}" for weight in weights)
            self._doubt("row-weighted", place, trained=trained, answers=len(weights), weights=listed)
        written = written_in(row)
        if "{{" in written and (match := PLACEHOLDER.search(written)):
            self._doubt("row-placeholder", place, found=match[0])
        if ("<" in written or "[" in written) and (match := CONTROL.search(written)):
            self._doubt("row-control-token", place, found=match[0])
        script = script_of(answer_of(row))
        self.scripts[script] += 1
        places = self.first_in.setdefault(script, [])
        if len(places) < self.most:
            places.append(place)
        for name, known in self.questions.items():
            if hash(question_of(row)) in known:
                self._doubt("row-leaked", place, name=name)
        self.rows.add(place, hash((written, row.get("label"))))

    def note_unread(self, row: Mapping[str, Any], read: frozenset[str]) -> None:
        if row.keys() <= read:
            return
        for column, value in row.items():
            if column not in read and column not in self.unread and value not in (None, "", [], {}):
                self.unread[column] = None

    def _doubt(self, code: str, place: Place, **values: Any) -> None:
        self._keep(problem(code, place=str(place), **values))

    def _keep(self, doubt: Problem) -> None:
        self.counts[doubt.code] += 1
        if self.counts[doubt.code] <= self.most:
            self.kept.append(doubt)

    def warnings(self, dataset: Dataset) -> tuple[Problem, ...]:
        """All that were kept; with them what only shows when every row has been seen, and what is odd about the set."""
        for note in dataset.notes:
            self._keep(note)
        scores = sorted(filter(SCORE.search, self.unread))
        labels = sorted(labels_among(self.unread)) if dataset.kind == "chat" else []
        others = [column for column in self.unread if column not in (*scores, *labels)]
        for code, columns in (
            ("scores-unread", scores),
            ("labels-unread", labels),
            ("columns-unread", others),
        ):
            if columns:
                listed = ", ".join(columns[:NAMED]) + (
                    f", … ({len(columns)})" if len(columns) > NAMED else ""
                )
                self._keep(problem(code, name=dataset.name, columns=listed))
        repeated = self.rows.repeated()
        self.counts["row-repeated"] = len(repeated)
        self.kept += [
            problem("row-repeated", place=again, first=first)
            for again, first in islice(
                ((self.rows.place(a), self.rows.place(b)) for a, b in repeated), self.most
            )
        ]
        self._strangers()
        self.counts = +self.counts
        return tuple(self.kept)

    def _strangers(self) -> None:
        """Answers in a script that hardly any other answer is in, where one script is the rule."""
        answers_by_script = Counter({script: count for script, count in self.scripts.items() if script})
        total = answers_by_script.total()
        if not total or max(answers_by_script.values()) < (1 - RARE) * total:
            return
        usual = answers_by_script.most_common(1)[0][0]
        for script, count in answers_by_script.items():
            if script != usual:
                self.counts["row-other-script"] += count
                self.kept += [
                    problem("row-other-script", place=str(place), found=script, usual=usual)
                    for place in self.first_in[script]
                ]


class _Fingerprints:
    """64 bits of each row and where it is, in 24 bytes a row. Two rows in a million million million are taken for
    equal by mistake."""

    def __init__(self) -> None:
        self.prints, self.numbers, self.lines = array("q"), array("Q"), array("Q")
        self.files: list[Place] = []  # the first place of each file
        self.starts: list[int] = []

    def add(self, place: Place, fingerprint: int) -> None:
        if len(self.prints) >= COMPARED:
            return
        if not self.files or self.files[-1].file is not place.file:
            self.starts.append(len(self.prints))
            self.files.append(place)
        self.prints.append(fingerprint)
        self.numbers.append(place.row)
        self.lines.append(0 if place.column else place.line or 0)

    def repeated(self) -> list[tuple[int, int]]:
        """(row, the first row that is the same) for each that has been there before, by the order of the rows."""
        import numpy as np

        prints = np.frombuffer(self.prints, np.int64) if self.prints else np.empty(0, np.int64)
        order = np.argsort(prints, kind="stable")
        new = np.ones(len(order), bool)
        new[1:] = prints[order[1:]] != prints[order[:-1]]
        firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        again = order[~new]
        by_row = np.argsort(again)
        return list(zip(again[by_row].tolist(), firsts[~new][by_row].tolist(), strict=True))

    def place(self, index: int) -> str:
        file = self.files[bisect_right(self.starts, index) - 1].file
        return str(Place(file, self.numbers[index], self.lines[index] or None))


def repeated_rows(dataset: Dataset, on_rows: OnRows | None = None) -> Iterator[bool]:
    """For every row of the set, good or bad, in order: whether a row before it was the same. Reads the set once,
    before the first answer; rows that cannot be read are never the same."""
    prints = _Fingerprints()
    unlike = 0
    for number, (place, row) in enumerate(entries(dataset)):
        if on_rows and number % TELL_EVERY == 0:
            on_rows(number)
        try:
            if isinstance(row, Problem):
                raise Refusal(row)
            canonical_row = example(dataset, place, row)
            prints.add(place, hash((written_in(canonical_row), canonical_row.get("label"))))
        except Refusal:
            unlike += 1
            prints.add(place, unlike)
    again = {index for index, _ in prints.repeated()}
    return (index in again for index in range(len(prints.prints)))


def _questions(dataset: Dataset) -> set[int]:
    """Fingerprints of the questions of a set that can be used."""
    fingerprints = set()
    for place, row in entries(dataset):
        if not isinstance(row, Problem):
            try:
                fingerprints.add(hash(question_of(example(dataset, place, row))))
            except Refusal:
                continue
    return fingerprints


# ------------------------------------------------------------------------------------- words of a row


def written_in(row: Example) -> str:
    """All that a row says, tool calls included; equal for rows that teach the same."""
    if "text" in row:
        return row["text"]
    turns = [*row["messages"], *row.get("chosen", ()), *row.get("rejected", ())]
    parts = [
        turn["content"] if "tool_calls" not in turn else f"{turn['content']}{turn['tool_calls']}"
        for turn in turns
    ]
    if row.get("answer"):
        parts.append(row["answer"])
    return "\n".join(parts)


def question_of(row: Example) -> str:
    """What a row asks: all before its last answer; of a text, the text."""
    if "text" in row:
        return row["text"]
    turns = row["messages"]
    apart = "chosen" in row or "answer" in row  # then no answer of the conversation is the row's own
    return "\n".join(turn["content"] for turn in (turns if apart else turns[: _last_answer(turns)]))


def answer_of(row: Example) -> str:
    """What a row answers: its last or chosen answer; of a text, the text."""
    if "text" in row:
        return row["text"]
    if "chosen" in row:
        return row["chosen"][-1]["content"]
    if "answer" in row:
        return row["answer"] or row["messages"][-1]["content"]
    return row["messages"][_last_answer(row["messages"])]["content"]


def _last_answer(turns: Sequence[Mapping[str, Any]]) -> int:
    """Where in a conversation the last answer is."""
    return max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")


def script_of(text: str) -> str:
    """The writing system that most letters of a text's beginning are of; "" if it has none.

    A Chinese character says as much as several letters, so names and terms in Latin do not outweigh a few of them.
    """
    text = text[:LOOKED_AT]
    if text.isascii():
        return "latin" if text.strip(" 0123456789.,-+*/=()\n") else ""
    seen: dict[str, int] = {}
    for run in RUNS.finditer(text):
        weight = 1 if run.lastgroup in ("latin", "cyrillic", "greek") else 3
        seen[run.lastgroup] = seen.get(run.lastgroup, 0) + weight * (run.end() - run.start())
    if "kana" in seen:  # Japanese is written in both
        return "kana"
    return max(seen, key=seen.__getitem__) if seen else ""
