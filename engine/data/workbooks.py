"""A workbook (Excel's or LibreOffice's) → rows of text, as a csv of the same sheet would have them.

It is read by a process of its own (`engine.data.workbook_reader`): an upload comes from anywhere, and calamine holds a whole
sheet in memory, so what a workbook may take of memory, time and disk is limited there, and its end is no end of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem
from engine.data.encodings import version
from engine.launch.workspace import PROJECT

WORKBOOK_SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
MAX_READER_MEMORY = (
    8 << 30
)  # bytes of address space, and no more than half of what is free; 1.2 GB for 170 MB of rows
MAX_READER_SECONDS = 300  # of processor time
MAX_ROWS_BYTES = 8 << 30  # bytes of the file of rows


@dataclass(frozen=True)
class SheetTable:
    """A sheet that was written out: its name, how many rows it has, the other sheets with a table, and what a person
    should know of how it was read."""

    sheet: str
    rows: int
    others: tuple[str, ...] = ()
    notes: tuple[Problem, ...] = ()


def to_jsonl(workbook: Path, target: Path, sheet: str = "") -> SheetTable:
    """Write the rows of a sheet as JSON lines: of the one called `sheet`, or the first with a table.

    Raises Refusal if the file is no workbook, or a bomb, or has no such sheet or no table; OSError if `target` cannot be
    written.
    """
    answer = _ask_reader(workbook, target=str(target.absolute()), sheet=sheet)
    notes = tuple(Problem(**record) for record in answer["notes"])
    return SheetTable(answer["sheet"], answer["rows"], tuple(answer["others"]), notes)


def tables(workbook: Path) -> list[str]:
    """Names of the sheets with a table, in order; remembered until the file changes. Raises Refusal as `to_jsonl` does."""
    return list(_tables(workbook, *version(workbook)))


@lru_cache(maxsize=64)
def _tables(workbook: Path, mtime_ns: int, size: int) -> tuple[str, ...]:
    return tuple(_ask_reader(workbook)["tables"])


def _ask_reader(workbook: Path, **question: str) -> Mapping[str, Any]:
    """What the reading process answers. Raises Refusal if it refuses, or ended before it had an answer."""
    free_memory, _ = hardware.memory()
    limits = {
        "memory": min(MAX_READER_MEMORY, free_memory // 2),
        "seconds": MAX_READER_SECONDS,
        "file": MAX_ROWS_BYTES,
    }
    child = subprocess.run(
        [sys.executable, "-m", "engine.data.workbook_reader"], cwd=PROJECT, capture_output=True, text=True, check=False,
        input=json.dumps({"workbook": str(workbook.absolute()), "limits": limits} | question),
        env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    if child.returncode < 0:  # calamine aborts where memory ends, and a signal ends it where its time does
        raise Refusal(problem("workbook-too-large", file=workbook.name))
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2]
        raise Refusal(problem("sheet-broken", file=workbook.name, reason=reason))
    answer = json.loads(child.stdout)
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]))
    if "problems" in answer:
        raise Refusal(Problem(**record) for record in answer["problems"])
    return answer
