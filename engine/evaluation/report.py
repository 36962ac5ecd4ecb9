"""What an evaluation has found, read: its summary, and its rows by pages, sorted and searched.

It is written by `engine.worker.evaluation.findings`; the file of rows is read once and kept until it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from engine.core.problems import fill
from engine.core.rundir import RESULT, RunDir, read_json, read_lines

Order = Literal["asked", "worst", "best", "changed"]
ORDERS: tuple[str, ...] = get_args(Order)
PAGE = 20
FILES = ("rows.csv", "rows.jsonl")  # of the report, to take away
CHIEF = ("margin", "chrf", "tokens")  # by which rows are sorted: the first of these that they have

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """Some of the rows. `number` from 1 of `pages`; `total` rows were found."""

    rows: Sequence[Row]
    number: int
    pages: int
    total: int


def summary(run: RunDir) -> dict[str, Any] | None:
    """The summary of a finished evaluation; None while there is none."""
    return read_json(run.report / "summary.json") if (run.report / RESULT).exists() else None


def files(run: RunDir) -> list[str]:
    """Those that can be taken away; none where no row was asked."""
    return list(FILES) if rows(run) else []


def page(run: RunDir, order: str = "asked", text: str = "", number: int = 1) -> Page:
    """The rows that hold every word of `text`, sorted, twenty at a time; the nearest page that there is."""
    found = [row for row in rows(run) if matches(row, text)]
    found = sort(found, order)
    pages = max(math.ceil(len(found) / PAGE), 1)
    number = min(max(number, 1), pages)
    return Page(found[(number - 1) * PAGE : number * PAGE], number, pages, len(found))


def rows(run: RunDir) -> Sequence[Row]:
    """All rows, in the order in which they were drawn."""
    file = run.report / "rows.jsonl"
    if not (run.report / RESULT).exists():
        return ()
    return _rows(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _rows(file: Path, _changed: int) -> Sequence[Row]:
    return tuple(read_lines(file))


def matches(row: Row, text: str) -> bool:
    """Whether every word of `text` is in the question, the reference or one of the answers."""
    wanted = text.casefold().split()
    if not wanted:
        return True
    hay = " ".join([
        *(str(one.get("content")) for one in row["messages"]),
        *(str(row.get(name) or "") for name in ("reference", "chosen", "rejected")),
        *(one["text"] for one in row["answers"].values()),
    ]).casefold()  # fmt: skip
    return all(word in hay for word in wanted)


def sort(found: Sequence[Row], order: str) -> list[Row]:
    """Worst or best by the score of the first result that is not the base; changed: where it differs most from the
    base, rows with the same answer last. Equal ones stay in their order; those without a score come last."""
    keys = {"worst": _score, "best": lambda row: -_score(row), "changed": lambda row: -_change(row)}
    return sorted(found, key=lambda row: _last(keys[order](row))) if order in keys else list(found)


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _chief(row: Row, voice: str) -> float:
    scores = row["answers"].get(voice, {}).get("scores", {})
    value = next((scores[name] for name in CHIEF if scores.get(name) is not None), math.nan)
    # Of equal scores the one that the model finds less likely is the worse.
    return value - scores.get("loss", 0.0) / 1e6


def _score(row: Row) -> float:
    names = list(row["answers"])
    return (
        _chief(row, names[1] if names[:1] == ["base"] and len(names) > 1 else names[0]) if names else math.nan
    )


def _change(row: Row) -> float:
    names = list(row["answers"])
    if len(names) < 2:
        return math.nan
    before, after = names[:2]
    same = row["answers"][before]["text"] == row["answers"][after]["text"]
    apart = abs(_chief(row, after) - _chief(row, before))
    return apart if not same or "chosen" in row else apart - 1e6


def told(found: Mapping[str, Any]) -> str:
    """The summary as a table for a shell: a line for each measure, a column for each model, each value with the
    interval in which 95 % of its resamples lie."""
    voices, lines = found["voices"], []
    width = max([26, *(len(one["title"]) + 2 for one in voices)])
    lines.append(
        fill("{rows} {rows:row/rows}", rows=found["rows"])
        + (f", {found['left_out']} left out" if found["left_out"] else "")
    )
    measured = [
        (name, one["values"], {id: apart[name] for id, apart in found["differences"].items()})
        for name, one in found["measures"].items()
    ]
    tasks = [
        (f"{one['task']}: {one['measure']}", one["values"], one["differences"]) for one in tasks_of(found)
    ]
    first = max([16, *(len(name) + 1 for name, _, _ in tasks)])
    lines.append(" " * first + "".join(f"{one['title']:>{width}}" for one in voices))
    for name, values, apart in measured + tasks:
        cells = "".join(f"{_with_interval(values[one['id']]):>{width}}" for one in voices)
        verdicts = [apart[one["id"]]["verdict"] for one in voices if one["id"] in apart]
        lines.append(f"{name:<{first}}{cells}  {', '.join(verdicts)}".rstrip())
    for one in voices:
        if sets := one.get("trained_on"):
            lines.append(f"{one['title']} was trained on {', '.join(sets)}: there it may only remember")
    return "\n".join(lines)


def tasks_of(found: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What tasks of lm-evaluation-harness have found; a report of before there were any has none."""
    return found.get("tasks", ())


def _with_interval(value: Mapping[str, Any]) -> str:
    if value.get("low") is None:
        return _short(value["value"])
    return f"{_short(value['value'])} [{_short(value['low'])}, {_short(value['high'])}]"


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
