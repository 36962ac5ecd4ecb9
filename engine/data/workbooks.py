"""A workbook (Excel or LibreOffice) → rows of text, as a CSV file of the same sheet would have them.

A process with limits reads it (`engine.data.workbook_reader`), because uploads are not trusted and calamine keeps a
whole sheet in memory (1.2 GB for 170 MB of rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.core.problems import Problem
from engine.data import limited_process
from engine.data.encodings import version

WORKBOOK_SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
READER = "engine.data.workbook_reader"


@dataclass(frozen=True)
class SheetTable:
    """A sheet that was written out: its name, its number of rows, the other sheets with a table, what a person should
    know about how it was read, and where its rows are (`engine.data.sheet_rows`)."""

    sheet: str
    rows: int
    others: tuple[str, ...] = ()
    notes: tuple[Problem, ...] = ()
    starts: tuple[tuple[int, int], ...] = ()


def to_jsonl(workbook: Path, target: Path, sheet: str = "") -> SheetTable:
    """Write the rows of a sheet as JSON lines: of the one called `sheet`, or the first with a table.

    Raises Refusal if the file is not a workbook, or unpacks to too much, or has no such sheet or no table; OSError if
    `target` cannot be written.
    """
    answer = limited_process.ask(READER, workbook, target=str(target.absolute()), sheet=sheet)
    notes = tuple(Problem(**record) for record in answer["notes"])
    starts = tuple((line, row) for line, row in answer["starts"])
    return SheetTable(answer["sheet"], answer["rows"], tuple(answer["others"]), notes, starts)


def tables(workbook: Path) -> list[str]:
    """Names of the sheets with a table, in order; cached until the file changes. Raises Refusal as `to_jsonl` does."""
    return list(_tables(workbook, *version(workbook)))


@lru_cache(maxsize=64)
def _tables(workbook: Path, mtime_ns: int, size: int) -> tuple[str, ...]:
    return tuple(limited_process.ask(READER, workbook)["tables"])
