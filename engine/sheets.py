"""An Excel workbook → rows of text, as a csv of the same sheet would have them: the first sheet, its first row the header.

Only the standard library, and as a stream: neither the workbook nor a sheet is ever whole in memory. An upload comes
from anywhere, so nothing in it is believed: what it unpacks to is counted while it is unpacked, and an XML file that
declares anything of its own is refused.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from xml.parsers import expat

from engine.problems import Refusal, problem

UNPACKED = 1 << 30  # bytes of XML that one part of a workbook may unpack to
SHARED = 256 << 20  # bytes of XML of the texts that cells share, which have to be held
RATIO = 400  # unpacked ÷ packed; real sheets reach some 100
BLOCK = 1 << 16
DATES = {
    *range(14, 23),
    *range(27, 37),
    *range(45, 48),
    *range(50, 59),
}  # number formats that come with Excel
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
IN_FORMAT = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]')  # what a number format only shows
# What a damaged, cut off, locked or lying file makes the readers raise.
BROKEN = (
    zipfile.BadZipFile, zlib.error, expat.ExpatError, LookupError, ValueError, ArithmeticError, RuntimeError, EOFError,
)  # fmt: skip
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def to_jsonl(workbook: Path, target: Path) -> int:
    """Write the rows of a workbook as JSON lines, and return how many. Raises Refusal if it is none, or a bomb."""
    try:
        with zipfile.ZipFile(workbook) as packed, target.open("w", encoding="utf-8") as lines:
            count = 0
            for row in _rows(packed, workbook.name):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            return count
    except BROKEN as error:
        reason = str(error).strip("'\"")
        raise Refusal(problem("sheet-broken", file=workbook.name, reason=reason)) from error


def _rows(packed: zipfile.ZipFile, name: str) -> Iterator[dict[str, str]]:
    sheet, since_1904 = _first_sheet(packed, name)
    shared = _shared(packed, name)
    dates = _date_styles(packed, name)
    header: dict[str, str] = {}
    for cells in _cells(packed, sheet, name):
        told = {
            column: _text(kind, value, style in dates, shared, since_1904)
            for column, (kind, style, value) in cells.items()
        }
        if not any(text.strip() for text in told.values()):
            continue
        if not header:
            header = {column: text.strip() for column, text in told.items() if text.strip()}
            if len(set(header.values())) < len(header):
                names = list(header.values())
                twice = ", ".join(dict.fromkeys(one for one in names if names.count(one) > 1))
                raise Refusal(problem("file-columns-twice", file=name, names=twice))
            continue
        row = {label: told.get(column, "") for column, label in header.items()}
        row |= {f"column {one}": text for one, text in told.items() if one not in header and text}
        yield row


def _text(kind: str, value: str, date: bool, shared: list[str], since_1904: bool) -> str:
    """What a cell shows, near enough: a number as it was typed, a date in ISO form."""
    if kind == "s":
        return shared[int(value)] if value else ""
    if kind == "b":
        return "true" if value == "1" else "false"
    if kind == "e":
        return ""
    if kind in ("str", "inlineStr", "d"):
        return _unescaped(value)
    return _number(value, date, since_1904) if value else ""


def _number(value: str, date: bool, since_1904: bool) -> str:
    number = float(value)
    if date and 0 <= number < 2_958_466:  # the year 9999
        moment = datetime(1904, 1, 1) if since_1904 else datetime(1899, 12, 30)
        moment += timedelta(seconds=round(number * 86_400))
        if number < 1:
            return f"{moment:%H:%M:%S}"
        return f"{moment:%Y-%m-%d}" if number == int(number) else f"{moment:%Y-%m-%d %H:%M:%S}"
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)


def _unescaped(text: str) -> str:
    return ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if "_x" in text else text


# ------------------------------------------------------------------------------------- parts of a workbook


def _parse(
    packed: zipfile.ZipFile,
    part: str,
    name: str,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None] = lambda tag: None,
    text: Callable[[str], None] = lambda said: None,
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
    info, size, limit = packed.getinfo(part), 0, limit or UNPACKED
    with packed.open(info) as stream:
        while block := stream.read(BLOCK):
            size += len(block)
            if size > limit or (size > 16 << 20 and size > RATIO * max(info.compress_size, 1)):
                raise Refusal(problem("sheet-bomb", file=name, limit=f"{limit >> 20} MB"))
            parser.Parse(block, False)
            yield
    parser.Parse(b"", True)
    yield


def _first_sheet(packed: zipfile.ZipFile, name: str) -> tuple[str, bool]:
    """The part that holds the first sheet one can see, and whether days are counted from 1904."""
    sheets: list[str] = []
    targets: dict[str, str] = {}
    since: list[bool] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "sheet" and attributes.get("state", "visible") == "visible":
            sheets.append(attributes[f"{RELATION} id"])
        elif tag == "workbookPr":
            since.append(attributes.get("date1904") in ("1", "true"))
        elif tag == "Relationship":
            targets[attributes["Id"]] = attributes["Target"]

    for part in ("xl/workbook.xml", "xl/_rels/workbook.xml.rels"):
        for _ in _parse(packed, part, name, start):
            pass
    if not sheets:
        raise Refusal(problem("sheet-broken", file=name, reason="no sheet"))
    target = targets[sheets[0]]
    return target.lstrip("/") if target.startswith("/") else f"xl/{target}", any(since)


def _shared(packed: zipfile.ZipFile, name: str) -> list[str]:
    """The texts that cells refer to by number, without the readings that may stand beside them."""
    if "xl/sharedStrings.xml" not in packed.namelist():
        return []
    found: list[str] = []
    said: list[str] = []
    inside = {"t": 0, "rPh": 0}

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag in inside:
            inside[tag] += 1

    def end(tag: str) -> None:
        if tag in inside:
            inside[tag] -= 1
        elif tag == "si":
            found.append(_unescaped("".join(said)))
            said.clear()

    def text(some: str) -> None:
        if inside["t"] and not inside["rPh"]:
            said.append(some)

    for _ in _parse(packed, "xl/sharedStrings.xml", name, start, end, text, SHARED):
        pass
    return found


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
        if number in DATES or re.search("[ymdhs]", IN_FORMAT.sub("", formats.get(number, "").lower()))
    }


def _cells(packed: zipfile.ZipFile, sheet: str, name: str) -> Iterator[dict[str, tuple[str, str, str]]]:
    """Row by row: letters of the column → kind, style and value of each cell."""
    done: list[dict[str, tuple[str, str, str]]] = []
    row: dict[str, tuple[str, str, str]] = {}
    cell = {"column": "", "kind": "", "style": ""}
    said: list[str] = []
    inside = {"v": 0, "t": 0, "rPh": 0}

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "c":
            column = attributes.get("r", "").rstrip("0123456789") or _letters(len(row))
            cell.update(column=column, kind=attributes.get("t", "n"), style=attributes.get("s", ""))
            said.clear()
        elif tag in inside:
            inside[tag] += 1

    def end(tag: str) -> None:
        nonlocal row
        if tag in inside:
            inside[tag] -= 1
        elif tag == "c":
            row[cell["column"]] = (cell["kind"], cell["style"], "".join(said))
        elif tag == "row":
            done.append(row)
            row = {}

    def text(some: str) -> None:
        if (inside["v"] or inside["t"]) and not inside["rPh"]:
            said.append(some)

    for _ in _parse(packed, sheet, name, start, end, text):
        yield from done
        done.clear()


def _letters(index: int) -> str:
    """0 → A, 26 → AA."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(65 + rest) + letters
    return letters
