"""Check a whole data set before training: every row that cannot be used, and what is unusual about the others.

One pass with one row in memory at a time; about 24 bytes are remembered of each row, to find duplicates. A problem
keeps a row from being trained on; a warning is something that a person would want to know and that a run would not
report.
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
from engine.core.stages import KINDS_BY_FORM, Form
from engine.data import row_files
from engine.data.columns import label_columns
from engine.data.datasets import Dataset, Example, convert_rows, entries, example, rows
from engine.data.loss_marks import ROW_MARK_COLUMNS
from engine.data.row_files import Place
from engine.data.row_images import IMAGE_COLUMNS, broken_image, images_of
from engine.data.soundness import flaw

MAX_ROWS_COMPARED = 50_000_000  # rows of a set that are compared with each other
PROGRESS_INTERVAL_ROWS = 5_000  # rows
ROWS_TRIED = 100  # rows, at least one of which is good
RARE_SCRIPT_SHARE = 0.05  # a script used by a smaller share of answers stands out
PLACEHOLDER = re.compile(r"\{\{\s*[\w.-]+\s*\}\}")
# What chat templates write between turns. A text that contains it has probably already been rendered by a template.
CONTROL_TOKEN = re.compile(r"<\|[\w-]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
SCRIPTS = {
    "han": "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": "\u3040-\u30ff",
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u052f",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "greek": "\u0370-\u03ff",
    "hebrew": "\u0590-\u05ff",
    "latin": "A-Za-z\u00c0-\u024f",
}
SCRIPT_RUN = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in SCRIPTS.items()))
SCORE_COLUMN = re.compile(r"score|rating|reward", re.IGNORECASE)  # columns that an author may think are used
MAX_COLUMNS_NAMED = 12  # columns that a warning names
SCRIPT_SAMPLE_CHARACTERS = 120  # characters of an answer that determine its script

OnBad = Callable[[Place, Problem, Any], None]
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class ValidationReport:
    """The result of `check`: usable and unusable rows, the first problems and warnings, and how many of each.

    `counts`: code of a problem or warning → number of rows. `scripts`: writing system → number of answers. `pictured`:
    number of rows with images.
    """

    good: int
    bad: int
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    scripts: Mapping[str, int] = field(default_factory=dict)
    pictured: int = 0

    @property
    def usable(self) -> bool:
        return self.good > 0


def check(
    dataset: Dataset,
    form: Form,
    limit: int | None = None,
    datasets: Sequence[Dataset] = (),
    max_problems: int = 20,
    *,
    images: bool = True,
    against: Iterable[Dataset] = (),
    on_bad: OnBad | None = None,
    on_rows: OnRows | None = None,
) -> ValidationReport:
    """Read up to `limit` rows and report which can be used for a stage that needs `form`.

    At most `max_problems` problems, and as many warnings of each kind, are kept; `bad` counts all. `datasets`: where to
    recommend other data sets from, if this one is of the wrong kind. `images`: the stage trains on images; otherwise
    rows with images are bad. `against`: sets whose questions must not occur in this one, since they are used for
    evaluation. `on_bad` gets every bad row, `on_rows` now and then the number of rows read. Images are decoded if all
    rows are checked; otherwise only their headers are read.
    """
    if dataset.problem is None and dataset.kind not in KINDS_BY_FORM[form]:
        fitting = ", ".join(recommended(datasets, form)) or "—"
        return ValidationReport(0, 0, (problem(f"kind-{form}-wanted", name=dataset.name, fitting=fitting),))
    good = bad = pictured = 0
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    read = dataset.read | ROW_MARK_COLUMNS
    try:
        collector = _WarningCollector(max_problems, {other.name: _question_fingerprints(other) for other in against})
        for place, row in islice(entries(dataset), limit):
            if on_rows and (good + bad) % PROGRESS_INTERVAL_ROWS == 0:
                on_rows(good + bad)
            try:
                if isinstance(row, Problem):
                    raise Refusal(row)
                canonical_row = example(dataset, place, row, form)
                has_images = _check_images(place, canonical_row, images, decode=limit is None)
                collector.check_row(place, canonical_row)
                pictured += has_images
                collector.note_unread(row, read | IMAGE_COLUMNS if has_images else read)
                good += 1
            except Refusal as refusal:
                (issue,) = refusal.problems
                bad += 1
                counts[issue.code] += 1
                if len(problems) < max_problems:
                    problems.append(issue)
                if on_bad:
                    on_bad(place, issue, None if isinstance(row, Problem) else row)
    except Refusal as refusal:
        return ValidationReport(0, 0, tuple(refusal.problems))
    if not good and not bad:
        problems.append(problem("dataset-empty", name=dataset.name))
    file_warnings = _file_warnings(dataset)
    counts.update(warning.code for warning in file_warnings)
    warnings = (*file_warnings, *collector.warnings(dataset))
    counts += collector.counts
    return ValidationReport(good, bad, tuple(problems), warnings, counts, dict(collector.scripts), pictured)


def _check_images(place: Place, row: Example, allowed: bool, decode: bool) -> bool:
    """Whether the row has images. Raises Refusal if it may not, or if `decode` finds a broken one."""
    pictured = any(images_of(row))
    if pictured and not allowed:
        raise Refusal(problem("row-images-stage", place=str(place)))
    if decode and (wrong := broken_image(row)):
        raise Refusal(wrong.at(place))
    return pictured


def _file_warnings(dataset: Dataset) -> list[Problem]:
    """What is uncertain about how its files are read."""
    doubts: list[Problem] = []
    for file in dataset.files:
        with contextlib.suppress(Refusal):  # that none of its rows can be read is reported as a problem
            doubts += row_files.source_of(file, dataset.encoding).doubts
    return doubts


def recommended(datasets: Sequence[Dataset], form: Form) -> list[str]:
    """Names of the sound data sets that have a row of that form among their first ones."""
    return [dataset.name for dataset in datasets if dataset.kind in KINDS_BY_FORM[form] and _has_row(dataset, form)]


def _has_row(dataset: Dataset, form: Form) -> bool:
    if flaw(dataset) or not dataset.files:
        return False
    return any(True for _ in convert_rows(dataset, islice(rows(dataset, _ignore), ROWS_TRIED), _ignore, form))


def _ignore(_: Problem) -> None:
    """Drop a problem."""


# -------------------------------------------------------------------------------------------- warnings


class _WarningCollector:
    """What is unusual about usable rows: within each row, and at the end between them."""

    def __init__(self, max_warnings: int, questions: Mapping[str, Collection[int]]):
        self.max_warnings, self.questions = max_warnings, questions
        self.counts: Counter[str] = Counter()
        self.collected: list[Problem] = []
        self.scripts: Counter[str] = Counter()
        self.first_places: dict[str, list[Place]] = {}
        self.unread_columns: dict[str, None] = {}  # columns without a role, although they are not empty
        self.rows = _Fingerprints()

    def check_row(self, place: Place, row: Example) -> None:
        for note in row.get("notes", ()):
            self._keep(note)
        if "weights" in row:
            weights = row["weights"]
            trained = sum(weight > 0 for weight in weights)
            listed = ", ".join(f"{weight:g}" for weight in weights)
            self._warn("row-weighted", place, trained=trained, answers=len(weights), weights=listed)
        written = example_text(row)
        if "{{" in written and (match := PLACEHOLDER.search(written)):
            self._warn("row-placeholder", place, found=match[0])
        if ("<" in written or "[" in written) and (match := CONTROL_TOKEN.search(written)):
            self._warn("row-control-token", place, found=match[0])
        script = script_of(example_answer(row))
        self.scripts[script] += 1
        places = self.first_places.setdefault(script, [])
        if len(places) < self.max_warnings:
            places.append(place)
        for name, known in self.questions.items():
            if hash(example_question(row)) in known:
                self._warn("row-leaked", place, name=name)
        self.rows.add(place, hash((written, row.get("label"))))

    def note_unread(self, row: Mapping[str, Any], read: frozenset[str]) -> None:
        if row.keys() <= read:
            return
        for column, value in row.items():
            if column not in read and column not in self.unread_columns and value not in (None, "", [], {}):
                self.unread_columns[column] = None

    def _warn(self, code: str, place: Place, **values: Any) -> None:
        self._keep(problem(code, place=str(place), **values))

    def _keep(self, warning: Problem) -> None:
        self.counts[warning.code] += 1
        if self.counts[warning.code] <= self.max_warnings:
            self.collected.append(warning)

    def warnings(self, dataset: Dataset) -> tuple[Problem, ...]:
        """All kept warnings, including those that need every row, and what is unusual about the whole set."""
        for note in dataset.notes:
            self._keep(note)
        scores = sorted(filter(SCORE_COLUMN.search, self.unread_columns))
        labels = sorted(label_columns(self.unread_columns)) if dataset.kind == "chat" else []
        others = [column for column in self.unread_columns if column not in (*scores, *labels)]
        for code, columns in (
            ("scores-unread", scores),
            ("labels-unread", labels),
            ("columns-unread", others),
        ):
            if columns:
                listed = ", ".join(columns[:MAX_COLUMNS_NAMED]) + (
                    f", … ({len(columns)})" if len(columns) > MAX_COLUMNS_NAMED else ""
                )
                self._keep(problem(code, name=dataset.name, columns=listed))
        repeated = self.rows.repeated()
        self.counts["row-repeated"] = len(repeated)
        self.collected += [
            problem("row-repeated", place=again, first=first)
            for again, first in islice(
                ((self.rows.place(a), self.rows.place(b)) for a, b in repeated), self.max_warnings
            )
        ]
        self._add_rare_scripts()
        self.counts = +self.counts
        return tuple(self.collected)

    def _add_rare_scripts(self) -> None:
        """Answers in a script that hardly any other answer uses, if one script dominates."""
        answers_by_script = Counter({script: count for script, count in self.scripts.items() if script})
        total = answers_by_script.total()
        if not total or max(answers_by_script.values()) < (1 - RARE_SCRIPT_SHARE) * total:
            return
        usual = answers_by_script.most_common(1)[0][0]
        for script, count in answers_by_script.items():
            if script != usual:
                self.counts["row-other-script"] += count
                self.collected += [
                    problem("row-other-script", place=str(place), found=script, usual=usual)
                    for place in self.first_places[script]
                ]


class _Fingerprints:
    """64 bits of each row and its place, in 24 bytes per row. The probability that two different rows are taken for
    equal is about 10⁻¹⁸ per pair."""

    def __init__(self) -> None:
        self.prints, self.numbers, self.lines = array("q"), array("Q"), array("Q")
        self.files: list[Place] = []  # the first place in each file
        self.starts: list[int] = []

    def add(self, place: Place, fingerprint: int) -> None:
        if len(self.prints) >= MAX_ROWS_COMPARED:
            return
        if not self.files or self.files[-1].file is not place.file:
            self.starts.append(len(self.prints))
            self.files.append(place)
        self.prints.append(fingerprint)
        self.numbers.append(place.row)
        self.lines.append(0 if place.column else place.line or 0)

    def repeated(self) -> list[tuple[int, int]]:
        """(row, the first equal row) for each row that occurred before, in the order of the rows."""
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
    """For every row of the set, good or bad, in order: whether an earlier row was equal. Reads the set once before the
    first answer; unreadable rows are never equal."""
    prints = _Fingerprints()
    unlike = 0
    for number, (place, row) in enumerate(entries(dataset)):
        if on_rows and number % PROGRESS_INTERVAL_ROWS == 0:
            on_rows(number)
        try:
            if isinstance(row, Problem):
                raise Refusal(row)
            canonical_row = example(dataset, place, row)
            prints.add(place, hash((example_text(canonical_row), canonical_row.get("label"))))
        except Refusal:
            unlike += 1
            prints.add(place, unlike)
    again = {index for index, _ in prints.repeated()}
    return (index in again for index in range(len(prints.prints)))


def _question_fingerprints(dataset: Dataset) -> set[int]:
    """Fingerprints of the usable questions of a set."""
    fingerprints = set()
    for place, row in entries(dataset):
        if not isinstance(row, Problem):
            try:
                fingerprints.add(hash(example_question(example(dataset, place, row))))
            except Refusal:
                continue
    return fingerprints


# ------------------------------------------------------------------------------------- words of a row


def example_text(row: Example) -> str:
    """Everything that a row says, including tool calls; equal for rows that teach the same."""
    if "text" in row:
        return row["text"]
    turns = [*row["messages"], *row.get("chosen", ()), *row.get("rejected", ())]
    parts = [
        turn["content"] if "tool_calls" not in turn else f"{turn['content']}{turn['tool_calls']}" for turn in turns
    ]
    parts += [image.identity for image in images_of(row)]
    if row.get("answer"):
        parts.append(row["answer"])
    return "\n".join(parts)


def example_question(row: Example) -> str:
    """What a row asks: everything before its last answer; for a text, the text."""
    if "text" in row:
        return row["text"]
    turns = row["messages"]
    apart = "chosen" in row or "answer" in row  # then no answer of the conversation is the row's own
    question = turns if apart else turns[: _last_answer(turns)]
    return "\n".join([*(turn["content"] for turn in question), *(image.identity for image in images_of(row))])


def example_answer(row: Example) -> str:
    """What a row answers: its last or chosen answer; for a text, the text."""
    if "text" in row:
        return row["text"]
    if "chosen" in row:
        return row["chosen"][-1]["content"]
    if "answer" in row:
        return row["answer"] or row["messages"][-1]["content"]
    return row["messages"][_last_answer(row["messages"])]["content"]


def _last_answer(turns: Sequence[Mapping[str, Any]]) -> int:
    """The position of the last answer in a conversation."""
    return max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")


def script_of(text: str) -> str:
    """The writing system of most letters at the beginning of a text; "" if it has none.

    A Chinese character says as much as several letters, so names and terms in Latin letters do not outweigh a few of
    them.
    """
    text = text[:SCRIPT_SAMPLE_CHARACTERS]
    if text.isascii():
        return "latin" if text.strip(" 0123456789.,-+*/=()\n") else ""
    seen: dict[str, int] = {}
    for run in SCRIPT_RUN.finditer(text):
        script = run.lastgroup or ""  # each alternative of the pattern has a name
        weight = 1 if script in ("latin", "cyrillic", "greek") else 3
        seen[script] = seen.get(script, 0) + weight * (run.end() - run.start())
    if "kana" in seen:  # Japanese is written in both
        return "kana"
    return max(seen, key=seen.__getitem__) if seen else ""
