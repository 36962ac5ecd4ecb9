"""Read the results of an evaluation: its summary, and its rows by pages, sorted and searched.

They are written by `engine.worker.evaluation.findings`; the file of rows is read once and cached until it changes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from engine.core.problems import fill
from engine.core.regular_files import open_regular
from engine.core.rundir import RESULT_FILE, RunDir, read_json, read_lines
from engine.data.images import ImageSource, image_from_json

Order = Literal["asked", "worst", "best", "changed"]
ORDERS: tuple[str, ...] = get_args(Order)
ROWS_PER_PAGE = 20
QUESTIONS_FILE = "questions.jsonl"  # the rows that were asked, in the folder of the report
ROW_FILES = ("rows.csv", "rows.jsonl")  # files of the report for download
SORTING_SCORES = ("margin", "judge", "chrf", "tokens")  # rows are sorted by the first of these that they have

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """Some of the rows. `number` of `pages`, from 1; `total` is the number of matching rows."""

    rows: Sequence[Row]
    number: int
    pages: int
    total: int


def summary(run: RunDir) -> dict[str, Any] | None:
    """The summary of a finished evaluation; None if there is none."""
    return read_json(run.report / "summary.json") if (run.report / RESULT_FILE).exists() else None


def files(run: RunDir) -> list[str]:
    """The files for download; none if no row was asked."""
    return list(ROW_FILES) if rows(run) else []


def page(run: RunDir, order: str = "asked", text: str = "", number: int = 1) -> Page:
    """The rows that contain every word of `text`, sorted, twenty per page; the nearest existing page."""
    matching = [row for row in rows(run) if matches(row, text)]
    matching = sort(matching, order)
    pages = max(math.ceil(len(matching) / ROWS_PER_PAGE), 1)
    number = min(max(number, 1), pages)
    return Page(matching[(number - 1) * ROWS_PER_PAGE : number * ROWS_PER_PAGE], number, pages, len(matching))


def rows(run: RunDir) -> Sequence[Row]:
    """All rows, in the order of sampling."""
    file = run.report / "rows.jsonl"
    if not (run.report / RESULT_FILE).exists():
        return ()
    return _rows(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _rows(file: Path, _changed: int) -> Sequence[Row]:
    return tuple(read_lines(file))


def images(run: RunDir, numbers: Collection[int]) -> dict[int, list[ImageSource]]:
    """The images in the questions of these rows, without those whose files have changed since."""
    shown: dict[int, list[ImageSource]] = {}
    with contextlib.suppress(OSError), open_regular(run.report / QUESTIONS_FILE) as file:
        for line in file:
            if b'"images"' not in line:
                continue
            try:
                question = json.loads(line)
                if (number := question["row"] + 1) in numbers:
                    seen = [image_from_json(image) for turn in question["messages"] for image in turn.get("images", ())]
                    shown[number] = [image for image in seen if image.is_unchanged()]
            except (ValueError, TypeError, LookupError, AttributeError):  # cut off, or damaged
                continue
    return shown


def matches(row: Row, text: str) -> bool:
    """Whether every word of `text` is in the question, the reference or one of the answers."""
    words = text.casefold().split()
    if not words:
        return True
    haystack = " ".join(
        [
            *(str(message.get("content")) for message in row["messages"]),
            *(str(row.get(name) or "") for name in ("reference", "chosen", "rejected")),
            *(answer["text"] for answer in row["answers"].values()),
        ]
    ).casefold()
    return all(word in haystack for word in words)


def sort(rows: Sequence[Row], order: str) -> list[Row]:
    """Worst or best by the score of the first result that is not the base; changed: where it differs most from the
    base, with identical answers last. Ties keep their order; rows without a score come last."""
    keys = {"worst": _score, "best": lambda row: -_score(row), "changed": lambda row: -_change(row)}
    return sorted(rows, key=lambda row: _last(keys[order](row))) if order in keys else list(rows)


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _sorting_score(row: Row, model: str) -> float:
    scores = row["answers"].get(model, {}).get("scores", {})
    value = next((scores[name] for name in SORTING_SCORES if scores.get(name) is not None), math.nan)
    # Among equal scores, the less likely one is the worse.
    return value - scores.get("loss", 0.0) / 1e6


def _score(row: Row) -> float:
    names = list(row["answers"])
    return (
        _sorting_score(row, names[1] if names[:1] == ["base"] and len(names) > 1 else names[0]) if names else math.nan
    )


def _change(row: Row) -> float:
    names = list(row["answers"])
    if len(names) < 2:
        return math.nan
    before, after = names[:2]
    same = row["answers"][before]["text"] == row["answers"][after]["text"]
    apart = abs(_sorting_score(row, after) - _sorting_score(row, before))
    return apart if not same or "chosen" in row else apart - 1e6


def as_text(summary: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The summary as a table for the command line: a line for each metric, a column for each model, each value with the
    interval that contains 95 % of its resamples; then the notes."""
    models, lines = summary["voices"], list[str]()
    if not models:  # nothing was evaluated, but a judge compared with a person's ratings
        return "\n".join(notes)
    measured_values = [measure["values"] for measure in summary["measures"].values()]
    shown = [_with_interval(values[model["id"]]) for values in measured_values for model in models]
    width = max([26, *(len(text) + 2 for text in [*shown, *(model["title"] for model in models)])])
    lines.append(
        fill("{rows} {rows:row/rows}", rows=summary["rows"])
        + (f", {summary['left_out']} left out" if summary["left_out"] else "")
    )
    measured = [
        (name, measure["values"], {id: apart[name] for id, apart in summary["differences"].items()})
        for name, measure in summary["measures"].items()
    ]
    tasks = [(f"{task['task']}: {task['measure']}", task["values"], task["differences"]) for task in tasks_of(summary)]
    first = max([16, *(len(name) + 1 for name, _, _ in tasks)])
    lines.append(" " * first + "".join(f"{model['title']:>{width}}" for model in models))
    for name, values, apart in measured + tasks:
        cells = "".join(f"{_with_interval(values[model['id']]):>{width}}" for model in models)
        verdicts = [apart[model["id"]]["verdict"] for model in models if model["id"] in apart]
        lines.append(f"{name:<{first}}{cells}  {', '.join(verdicts)}".rstrip())
    for model in models:
        if sets := model.get("trained_on"):
            lines.append(f"{model['title']} was trained on {', '.join(sets)}: there it may only remember")
        if counts := summary.get("reasoning", {}).get(model["id"]):
            lines.append(f"{model['title']}: {reasoning_note(counts)}")
    return "\n".join([*lines, *notes])


def reasoning_note(counts: Mapping[str, int]) -> str:
    """How many answers contain reasoning, which metrics leave out, and how many of them did not get beyond it."""
    rows = fill("{rows} {rows:answer contains/answers contain} reasoning", rows=counts["rows"])
    cut = fill(", and {n} {n:was/were} cut off within it", n=counts["unfinished"]) if counts["unfinished"] else ""
    return rows + cut


def tasks_of(summary: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The results of lm-evaluation-harness tasks; older reports have none."""
    return summary.get("tasks", ())


def _with_interval(value: Mapping[str, Any]) -> str:
    if value.get("low") is None:
        return _short(value["value"])
    return f"{_short(value['value'])} [{_short(value['low'])}, {_short(value['high'])}]"


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
