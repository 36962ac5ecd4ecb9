"""An Excel workbook → rows of text, as a csv of the same sheet would have them.

The sheet is the one that is named, or the first with a table; its header is its first row, or the one below a title.
Cells merged downwards stand in each of their rows. Only the standard library, and as a stream: neither the workbook nor a sheet is ever whole in memory. An upload comes
from anywhere, so nothing in it is believed: what it unpacks to is counted while it is unpacked, and an XML file that
declares anything of its own is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any
from xml.parsers import expat

from engine.core.problems import Problem, Refusal, problem

MAX_PART_BYTES = 1 << 30  # bytes of XML that one part of a workbook may unpack to
MAX_SHARED_STRINGS_BYTES = 256 << 20  # bytes of XML of the texts that cells share, which have to be held
MAX_COMPRESSION_RATIO = 400  # unpacked ÷ packed; real sheets reach some 100
BLOCK_BYTES = 1 << 16
MAX_TITLE_ROWS = 5  # above a header, at the most
MAX_TITLE_CHARACTERS = 80  # characters
MAX_MERGED_RANGES = 100_000
MERGE_MARK = b"mergeCell"
MERGED_RANGE = re.compile(rb'mergeCell\b[^>]*?\bref="([A-Z]{1,3})(\d{1,7}):[A-Z]{1,3}(\d{1,7})"')
DATE_FORMAT_IDS = {
    *range(14, 23),
    *range(27, 37),
    *range(45, 48),
    *range(50, 59),
}  # number formats that come with Excel
ESCAPED_CHARACTER = re.compile(r"_x([0-9A-Fa-f]{4})_")
FORMAT_LITERAL = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]')  # what a number format only shows
# What a damaged, cut off, locked or lying file makes the readers raise.
READ_ERRORS = (
    zipfile.BadZipFile, zlib.error, expat.ExpatError, LookupError, ValueError, ArithmeticError, RuntimeError, EOFError,
)  # fmt: skip
MergedRanges = dict[str, dict[int, int]]
OnNote = Callable[[Problem], None]
RELATIONSHIP_NAMESPACE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


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

    Raises Refusal if the file is no workbook, or a bomb, or has no such sheet or no table.
    """
    with _open_workbook(workbook) as book, target.open("w", encoding="utf-8") as lines:
        names = book.tables()
        if sheet and sheet not in book.sheets:
            raise Refusal(
                problem("sheet-unknown", file=workbook.name, sheet=sheet, known=", ".join(book.sheets))
            )
        if not names:
            raise Refusal(problem("sheet-empty", file=workbook.name))
        chosen, notes, count = sheet or names[0], [], 0
        for row in book.rows(chosen, notes.append):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    others = tuple(name for name in names if name != chosen)
    if others:
        notes.insert(0, problem("sheet-others", file=workbook.name, sheet=chosen, others=", ".join(others)))
    return SheetTable(chosen, count, others, tuple(notes))


def tables(workbook: Path) -> list[str]:
    """Names of the sheets with a table, in order. Raises Refusal if the file is no workbook, or a bomb."""
    with _open_workbook(workbook) as book:
        return book.tables()


@contextlib.contextmanager
def _open_workbook(workbook: Path) -> Iterator[_Workbook]:
    try:
        with zipfile.ZipFile(workbook) as packed:
            yield _Workbook(packed, workbook.name)
    except READ_ERRORS as error:
        reason = str(error).strip("'\"")
        raise Refusal(problem("sheet-broken", file=workbook.name, reason=reason)) from error


class _Workbook:
    """What all sheets of a workbook share. `sheets`: those one can see, name → part."""

    def __init__(self, packed: zipfile.ZipFile, name: str):
        self.packed, self.name = packed, name
        self.sheets, self.since_1904 = _visible_sheets(packed, name)
        self.shared = _shared_strings(packed, name)
        self.dates = _date_styles(packed, name)

    def rows(self, sheet: str, on_note: OnNote = lambda note: None) -> Iterator[dict[str, str]]:
        """The rows below the header, by the names in it; what a column without a name holds goes by its letters."""
        merged, header = _merged_ranges(self.packed, self.sheets[sheet], self.name), {}
        filled = self._filled(sheet, merged, on_note)
        above, below = _split_title(filled)
        if above:
            title = _cell_texts(above[0])[0]
            on_note(
                problem("sheet-title", file=self.name, rows=len(above), title=title[:MAX_TITLE_CHARACTERS])
            )
        for cells in below:
            if not header:
                header = {column: text.strip() for column, text in cells.items() if text.strip()}
                twice = [name for name, count in Counter(header.values()).items() if count > 1]
                if twice:
                    raise Refusal(problem("file-columns-twice", file=self.name, names=", ".join(twice)))
                continue
            row = {label: cells.get(column, "") for column, label in header.items()}
            yield row | {
                f"column {column}": text for column, text in cells.items() if column not in header and text
            }

    def tables(self) -> list[str]:
        """The sheets with several columns and rows; where there is none, those with several rows."""
        first = {sheet: list(islice(self._filled(sheet, {}), MAX_TITLE_ROWS + 3)) for sheet in self.sheets}
        wide = [
            sheet for sheet, rows in first.items() if sum(len(_cell_texts(row)) > 1 for row in rows) > 1
        ]  # fmt: skip
        return wide or [sheet for sheet, rows in first.items() if len(rows) > 1]

    def _filled(
        self, sheet: str, merged: MergedRanges, on_note: OnNote = lambda note: None
    ) -> Iterator[dict[str, str]]:
        """Every row with something in it, as text; a cell that is merged downwards in each of its rows."""
        repeated = 0
        held: dict[str, tuple[int, str]] = {}  # column → last row that is merged, and what stands in it
        for number, cells in _cell_rows(self.packed, self.sheets[sheet], self.name):
            row = {
                column: _cell_text(kind, value, style in self.dates, self.shared, self.since_1904)
                for column, (kind, style, value) in cells.items()
            }
            if not any(text.strip() for text in row.values()):
                continue
            for column, ranges in merged.items():
                if number in ranges:
                    held[column] = ranges[number], row.get(column, "")
                elif not row.get(column) and number <= held.get(column, (0, ""))[0]:
                    row[column] = held[column][1]
                    repeated += 1
            yield row
        if repeated:
            on_note(problem("sheet-merged", file=self.name, cells=repeated))


def _cell_texts(row: Mapping[str, str]) -> list[str]:
    return [text.strip() for text in row.values() if text.strip()]


def _split_title(rows: Iterator[dict[str, str]]) -> tuple[list[dict[str, str]], Iterator[dict[str, str]]]:
    """The title rows above a table, and its rows from the header on.

    A title is a row of one cell above a header of several, with a row of several below that; in a sheet of one column
    nothing is a title.
    """
    head: list[dict[str, str]] = []
    for row in rows:
        head.append(row)
        wide = [len(_cell_texts(head_row)) > 1 for head_row in head]
        if len(wide) > 1 and wide[-1] and wide[-2]:
            if not any(wide[:-2]):
                return head[:-2], chain(head[-2:], rows)
            break
        if len(wide) > MAX_TITLE_ROWS + 2 or wide[0]:
            break
    return [], chain(head, rows)


def _cell_text(kind: str, value: str, date: bool, shared: list[str], since_1904: bool) -> str:
    """What a cell shows, near enough: a number as it was typed, a date in ISO form."""
    if kind == "s":
        return shared[int(value)] if value else ""
    if kind == "b":
        return "true" if value == "1" else "false"
    if kind == "e":
        return ""
    if kind in ("str", "inlineStr", "d"):
        return _unescaped(value)
    return _number_text(value, date, since_1904) if value else ""


def _number_text(value: str, date: bool, since_1904: bool) -> str:
    number = float(value)
    if date and 0 <= number < 2_958_466:  # the year 9999
        moment = datetime(1904, 1, 1) if since_1904 else datetime(1899, 12, 30)
        moment += timedelta(seconds=round(number * 86_400))
        if number < 1:
            return f"{moment:%H:%M:%S}"
        return f"{moment:%Y-%m-%d}" if number == int(number) else f"{moment:%Y-%m-%d %H:%M:%S}"
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)


def _unescaped(text: str) -> str:
    return ESCAPED_CHARACTER.sub(lambda match: chr(int(match[1], 16)), text) if "_x" in text else text


# ------------------------------------------------------------------------------------- parts of a workbook


def _parse(
    packed: zipfile.ZipFile,
    part: str,
    name: str,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None] = lambda tag: None,
    text: Callable[[str], None] = lambda characters: None,
    limit: int | None = None,
) -> Iterator[None]:
    """Reads one XML part in blocks, and comes back after each, so that what was found can be handed on."""
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = lambda tag, attributes: start(tag.rpartition(" ")[2], attributes)
    parser.EndElementHandler = lambda tag: end(tag.rpartition(" ")[2])
    parser.CharacterDataHandler = text

    def refuse(*_: Any) -> None:
        raise Refusal(problem("sheet-broken", file=name, reason="DOCTYPE"))

    parser.StartDoctypeDeclHandler = refuse
    for block in _unpacked_blocks(packed, part, name, limit or MAX_PART_BYTES):
        parser.Parse(block, False)
        yield
    parser.Parse(b"", True)
    yield


def _unpacked_blocks(packed: zipfile.ZipFile, part: str, name: str, limit: int) -> Iterator[bytes]:
    """A part in blocks. Raises Refusal if it is larger than it may be."""
    info, size = packed.getinfo(part), 0
    with packed.open(info) as stream:
        while block := stream.read(BLOCK_BYTES):
            size += len(block)
            if size > limit or (
                size > 16 << 20 and size > MAX_COMPRESSION_RATIO * max(info.compress_size, 1)
            ):
                raise Refusal(problem("sheet-bomb", file=name, limit=f"{limit >> 20} MB"))
            yield block


def _visible_sheets(packed: zipfile.ZipFile, name: str) -> tuple[dict[str, str], bool]:
    """The sheets one can see, name → part; and whether days are counted from 1904."""
    sheets: dict[str, str] = {}
    targets: dict[str, str] = {}
    since: list[bool] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "sheet" and attributes.get("state", "visible") == "visible":
            sheets[attributes.get("name", f"{len(sheets) + 1}")] = attributes[f"{RELATIONSHIP_NAMESPACE} id"]
        elif tag == "workbookPr":
            since.append(attributes.get("date1904") in ("1", "true"))
        elif tag == "Relationship" and not attributes.get("Type", "worksheet").endswith("chartsheet"):
            targets[attributes["Id"]] = attributes["Target"]

    for part in ("xl/workbook.xml", "xl/_rels/workbook.xml.rels"):
        for _ in _parse(packed, part, name, start):
            pass
    if not sheets:
        raise Refusal(problem("sheet-broken", file=name, reason="no sheet"))
    visible = {sheet: targets[id] for sheet, id in sheets.items() if id in targets}
    parts = {
        sheet: target.lstrip("/") if target.startswith("/") else f"xl/{target}"
        for sheet, target in visible.items()
    }
    return parts, any(since)


def _merged_ranges(packed: zipfile.ZipFile, part: str, name: str) -> MergedRanges:
    """Cells that are merged over several rows: letters of the column → first row → last row.

    They stand at the end of the part, so it is unpacked for them once more, but not parsed.
    """
    merged: MergedRanges = {}
    rest, count = b"", 0
    for block in _unpacked_blocks(packed, part, name, MAX_PART_BYTES):
        rest = rest[-200:] + block
        if MERGE_MARK not in rest:
            continue
        last = 0
        for match in MERGED_RANGE.finditer(rest):
            column, first, final = match[1].decode(), int(match[2]), int(match[3])
            last, count = match.end(), count + 1
            if final > first and count <= MAX_MERGED_RANGES:
                merged.setdefault(column, {})[first] = final
        rest = rest[last:]
    return merged


def _shared_strings(packed: zipfile.ZipFile, name: str) -> list[str]:
    """The texts that cells refer to by number, without the readings that may stand beside them."""
    if "xl/sharedStrings.xml" not in packed.namelist():
        return []
    strings: list[str] = []
    fragments: list[str] = []
    inside = {"t": 0, "rPh": 0}

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag in inside:
            inside[tag] += 1

    def end(tag: str) -> None:
        if tag in inside:
            inside[tag] -= 1
        elif tag == "si":
            strings.append(_unescaped("".join(fragments)))
            fragments.clear()

    def text(characters: str) -> None:
        if inside["t"] and not inside["rPh"]:
            fragments.append(characters)

    for _ in _parse(packed, "xl/sharedStrings.xml", name, start, end, text, MAX_SHARED_STRINGS_BYTES):
        pass
    return strings


def _date_styles(packed: zipfile.ZipFile, name: str) -> set[str]:
    """Numbers of the cell styles that show a number as a date."""
    if "xl/styles.xml" not in packed.namelist():
        return set()
    formats: dict[int, str] = {}
    styles: list[int] = []
    within: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        within.append(tag)
        if tag == "numFmt":
            formats[int(attributes["numFmtId"])] = attributes.get("formatCode", "")
        elif tag == "xf" and within[-2:-1] == ["cellXfs"]:
            styles.append(int(attributes.get("numFmtId", 0)))

    for _ in _parse(packed, "xl/styles.xml", name, start, lambda tag: (within.pop(), None)[1]):
        pass
    return {
        str(index)
        for index, number in enumerate(styles)
        if number in DATE_FORMAT_IDS
        or re.search("[ymdhs]", FORMAT_LITERAL.sub("", formats.get(number, "").lower()))
    }


def _cell_rows(
    packed: zipfile.ZipFile, sheet: str, name: str
) -> Iterator[tuple[int, dict[str, tuple[str, str, str]]]]:
    """Row by row its number, and letters of the column → kind, style and value of each cell."""
    done: list[tuple[int, dict[str, tuple[str, str, str]]]] = []
    number = 0
    row: dict[str, tuple[str, str, str]] = {}
    cell = {"column": "", "kind": "", "style": ""}
    fragments: list[str] = []
    inside = {"v": 0, "t": 0, "rPh": 0}

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal number
        if tag == "row":
            number = int(attributes.get("r", number + 1))
        elif tag == "c":
            column = attributes.get("r", "").rstrip("0123456789") or _column_letters(len(row))
            cell.update(column=column, kind=attributes.get("t", "n"), style=attributes.get("s", ""))
            fragments.clear()
        elif tag in inside:
            inside[tag] += 1

    def end(tag: str) -> None:
        nonlocal row
        if tag in inside:
            inside[tag] -= 1
        elif tag == "c":
            row[cell["column"]] = (cell["kind"], cell["style"], "".join(fragments))
        elif tag == "row":
            done.append((number, row))
            row = {}

    def text(characters: str) -> None:
        if (inside["v"] or inside["t"]) and not inside["rPh"]:
            fragments.append(characters)

    for _ in _parse(packed, sheet, name, start, end, text):
        yield from done
        done.clear()


def _column_letters(index: int) -> str:
    """0 → A, 26 → AA."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(65 + rest) + letters
    return letters
