"""The process that reads a workbook.

It reads the given sheet, or the first one with a table. The header is the first row, or the one below a title.
Vertically merged cells are repeated in each of their rows. The unpacked size of a workbook is determined before
calamine opens it.
"""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date, datetime, time, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from engine.core.problems import Problem, Refusal, problem
from engine.data import limited_process

MAX_UNPACKED_BYTES = 4 << 30  # bytes of all parts of a workbook; a sheet of a million rows has about 500 MB of XML
MAX_COMPRESSION_RATIO = 400  # unpacked ÷ packed; real sheets reach about 100
RATIO_FREE_BYTES = 16 << 20  # bytes of a part that are accepted whatever the ratio
BLOCK_BYTES = 1 << 20
MAX_TITLE_ROWS = 5  # above a header, at most
MAX_TITLE_CHARACTERS = 80  # characters
MAX_GAPS = 10_000  # between rows of a sheet; with more of them, its rows are called by their lines in the data file
# What readers raise for a damaged, truncated or encrypted file.
READ_ERRORS = (CalamineError, zipfile.BadZipFile, zlib.error, EOFError, LookupError, ValueError, RuntimeError)
CELL_LIMIT = "Cell limit exceeded"  # the start of calamine's message that a sheet has more than 100 million cells
Row = dict[int, str]  # column, from 0 → its content
Numbered = tuple[int, Row]  # with its number in the sheet, from 0
OnNote = Callable[[Problem], None]


def _read(workbook: Path, target: str = "", sheet: str = "") -> dict[str, Any]:
    try:
        return _answer(workbook, target, sheet)
    except READ_ERRORS as error:
        reason = str(error).strip("'\"")
        code = "file-takes-too-much" if reason.startswith(CELL_LIMIT) else "sheet-broken"
        raise Refusal(problem(code, file=workbook.name, reason=reason)) from error


def _answer(workbook: Path, target: str, sheet: str) -> dict[str, Any]:
    """The sheets with a table. With a `target`, the rows of one are written there, and the answer says how they were
    read."""
    if workbook.suffix.lower() != ".xls":
        _refuse_bomb(workbook)
    with CalamineWorkbook.from_path(workbook) as book:
        names = _visible_sheets(book, workbook.name)
        tables = _tables(book, names)
        if not target:
            return {"tables": tables}
        if sheet and sheet not in names:
            raise Refusal(problem("sheet-unknown", file=workbook.name, sheet=sheet, known=", ".join(names)))
        if not tables:
            raise Refusal(problem("sheet-empty", file=workbook.name))
        notes: list[Problem] = []
        chosen, count = sheet or tables[0], 0
        starts: list[tuple[int, int]] = []
        with open(target, "w", encoding="utf-8") as lines:
            for number, row in _rows(book.get_sheet_by_name(chosen), workbook.name, notes.append):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                if not starts or number - count != starts[-1][1] - starts[-1][0]:
                    starts.append((count, number))
    others = [name for name in tables if name != chosen]
    if others:
        notes.insert(0, problem("sheet-others", file=workbook.name, sheet=chosen, others=", ".join(others)))
    recorded = {"notes": [asdict(note) for note in notes], "starts": starts if len(starts) <= MAX_GAPS else []}
    return {"sheet": chosen, "rows": count, "others": others} | recorded


def _refuse_bomb(workbook: Path) -> None:
    """Raises Refusal if a packed workbook is larger than allowed, according to its headers or its content."""
    with zipfile.ZipFile(workbook) as packed:
        total = 0
        if sum(member.file_size for member in packed.infolist()) > MAX_UNPACKED_BYTES:
            raise Refusal(problem("file-takes-too-much", file=workbook.name))
        for member in packed.infolist():
            size, allowed = 0, max(RATIO_FREE_BYTES, MAX_COMPRESSION_RATIO * member.compress_size)
            member.file_size = sys.maxsize
            del member.CRC  # so that all of it is read, whatever its headers say
            with packed.open(member) as stream:
                while block := stream.read(BLOCK_BYTES):
                    size, total = size + len(block), total + len(block)
                    if size > allowed or total > MAX_UNPACKED_BYTES:
                        raise Refusal(problem("file-takes-too-much", file=workbook.name))


def _visible_sheets(book: CalamineWorkbook, name: str) -> list[str]:
    sheets = [
        sheet.name
        for sheet in book.sheets_metadata
        if sheet.visible == SheetVisibleEnum.Visible and sheet.typ == SheetTypeEnum.WorkSheet
    ]
    if not sheets:
        raise Refusal(problem("sheet-broken", file=name, reason="no sheet"))
    return sheets


def _tables(book: CalamineWorkbook, sheets: Sequence[str]) -> list[str]:
    """The sheets with several columns and rows; if there are none, those with several rows."""
    first = {sheet: list(islice(_filled(book.get_sheet_by_name(sheet)), MAX_TITLE_ROWS + 3)) for sheet in sheets}
    wide = [sheet for sheet, rows in first.items() if sum(len(_cell_texts(row)) > 1 for _, row in rows) > 1]
    return wide or [sheet for sheet, rows in first.items() if len(rows) > 1]


def _rows(sheet: CalamineSheet, name: str, on_note: OnNote) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header, by its names, each with its number from 1; columns without a name are called by their
    letters."""
    above, below = _split_title(_unmerged(sheet, name, on_note))
    if above:
        title = _cell_texts(above[0][1])[0]
        on_note(problem("sheet-title", file=name, rows=len(above), title=title[:MAX_TITLE_CHARACTERS]))
    _, names = next(below, (0, Row()))
    header = {column: text.strip() for column, text in names.items() if text.strip()}
    twice = [label for label, count in Counter(header.values()).items() if count > 1]
    if twice:
        raise Refusal(problem("file-columns-twice", file=name, names=", ".join(twice)))
    for number, cells in below:
        row = {label: cells.get(column, "") for column, label in header.items()}
        unnamed = {f"column {_letters(column)}": text for column, text in cells.items() if column not in header}
        yield number + 1, row | {label: text for label, text in unnamed.items() if text}


def _unmerged(sheet: CalamineSheet, name: str, on_note: OnNote) -> Iterator[Numbered]:
    """Every row with some content; vertically merged cells are repeated in each of their rows."""
    merged = {(first, column): last for (first, column), (last, _) in sheet.merged_cell_ranges or () if last > first}
    columns = {column for _, column in merged}
    repeated = 0
    held: dict[int, tuple[int, str]] = {}  # column → last merged row, and the content
    for number, row in _filled(sheet):
        for column in columns:
            if last := merged.get((number, column)):
                held[column] = last, row.get(column, "")
            elif not row.get(column) and number <= held.get(column, (-1, ""))[0]:
                row[column] = held[column][1]
                repeated += 1
        yield number, row
    if repeated:
        on_note(problem("sheet-merged", file=name, cells=repeated))


def _filled(sheet: CalamineSheet) -> Iterator[Numbered]:
    """Every row with some content, by its number from 0. calamine includes empty rows above, but no empty columns
    before."""
    left = sheet.start[1] if sheet.start else 0
    for number, cells in enumerate(sheet.iter_rows()):
        row = {column: _text(value) for column, value in enumerate(cells, left) if value != ""}
        if _cell_texts(row):
            yield number, row


def _cell_texts(row: Mapping[int, str]) -> list[str]:
    return [text.strip() for text in row.values() if text.strip()]


def _split_title(rows: Iterator[Numbered]) -> tuple[list[Numbered], Iterator[Numbered]]:
    """The title rows above a table, and its rows from the header on.

    A title is a row with one cell above a header of several, followed by a row of several; in a sheet with one column
    there is no title.
    """
    head: list[Numbered] = []
    for row in rows:
        head.append(row)
        wide = [len(_cell_texts(cells)) > 1 for _, cells in head]
        if len(wide) > 1 and wide[-1] and wide[-2]:
            if not any(wide[:-2]):
                return head[:-2], chain(head[-2:], rows)
            break
        if len(wide) > MAX_TITLE_ROWS + 2 or wide[0]:
            break
    return [], chain(head, rows)


def _text(value: Any) -> str:
    """What a cell shows, approximately: a number as it was typed, a date in ISO format, a duration in hours."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, timedelta):
        minutes, seconds = divmod(round(value.total_seconds()), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if isinstance(value, datetime):
        return value.isoformat(" ", timespec="seconds")
    if isinstance(value, time):
        return value.isoformat(timespec="seconds")
    return value.isoformat() if isinstance(value, date) else str(value)


def _letters(column: int) -> str:
    """0 → A, 26 → AA."""
    letters = ""
    column += 1
    while column:
        column, rest = divmod(column - 1, 26)
        letters = chr(65 + rest) + letters
    return letters


if __name__ == "__main__":
    limited_process.reply(_read)
