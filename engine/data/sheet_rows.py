"""Which row of which sheet each row of a converted workbook was, kept in a hidden file next to the converted rows."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core.rundir import read_object, write_text
from engine.data.encodings import version


def _file(rows: Path) -> Path:
    return rows.with_name(f".{rows.name}.rows")


def keep(rows: Path, workbook: str, sheet: str, starts: tuple[tuple[int, int], ...]) -> None:
    """Store where the lines of `rows` were: in a sheet of the file called `workbook`. `starts` are pairs of a line and
    its row in the sheet, both from 1, for the first line and for each after a gap. Raises OSError."""
    origin = {"workbook": workbook, "sheet": sheet, "version": version(rows), "starts": starts}
    write_text(_file(rows), json.dumps(origin, ensure_ascii=False))


def forget(rows: Path) -> None:
    """Delete what is stored about `rows`."""
    _file(rows).unlink(missing_ok=True)


def workbook_name(rows: Path) -> str:
    """What the workbook of `rows` was called when it was uploaded; empty if that is not stored."""
    name = read_object(_file(rows)).get("workbook")
    return name if isinstance(name, str) else ""


def place_in_sheet(rows: Path, line: int) -> str:
    """A line of a converted workbook as a place in its sheet, as spreadsheets write it: `book.xlsx:Sheet1!A7`. Empty
    for any other file, and if the file was edited since then."""
    kept = _file(rows)
    try:
        origin = _origin(kept, version(kept))
        if tuple(origin["version"]) != version(rows):
            return ""
        starts = origin["starts"]
        first, row = starts[bisect_right(starts, line, key=lambda start: start[0]) - 1]
        return f"{origin['workbook']}:{_quoted(origin['sheet'])}!A{row + line - first}"
    except (OSError, LookupError, TypeError, ValueError):  # there is none, or it is damaged
        return ""


@lru_cache(maxsize=64)
def _origin(kept: Path, _version: tuple[int, int]) -> Mapping[str, Any]:
    return read_object(kept)


def _quoted(sheet: str) -> str:
    return sheet if re.fullmatch(r"[^\W\d]\w*", sheet) else "'" + sheet.replace("'", "''") + "'"
