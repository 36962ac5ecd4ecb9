"""Split data files into blocks whose rows can be parsed independently, so that several processes share the work.

A block of a JSON file is a range of its bytes, found without parsing. The end of a block of an array is guessed from
the beginning of its first row and proved by parsing: a range that begins at a row and is complete JSON ends at one.
Where the guess does not fit, and for other formats, rows are read one by one by the readers of `engine.data.row_files`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine.data import json_layout
from engine.data.encodings import encoding_of
from engine.data.json_layout import parse_line
from engine.data.row_files import entries, valid_rows
from engine.data.text_lines import MAX_ROW_BYTES, Entry, Located, OnBad, Row, name_of_line

CHUNK_BYTES = 1 << 19  # approximate bytes of a block
MAX_BLOCK_ROWS = 2000  # of a file that is read row by row; fewer if the rows are long (BLOCK_BYTES characters)
FIRST_ROW_START = re.compile(rb"\s*\[\s*(\{\s*\"[^\"\\]*\")")
ELEMENT_SEPARATOR = re.compile(r"[\s,]*")


class InvalidByteRange(Exception):
    """A byte range is not complete JSON: from there on, its file has to be read row by row."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a UTF-8 file that begin and end with a row. `before` and `after` turn them into an array; lines need
    neither."""

    file: Path
    begin: int
    end: int
    line: int  # where the bytes begin
    before: bytes = b""
    after: bytes = b""

    @cached_property
    def data(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            return stream.read(self.end - self.begin)

    def rows(self, on_bad: OnBad) -> Iterator[tuple[Located, Row]]:
        """Each row and its place, which is valid until the next; anything that is not a row goes to `on_bad`.

        Raises InvalidByteRange before the first row.
        """
        return valid_rows(self._array() if self.before else self._lines(), on_bad)

    def _array(self) -> Iterator[tuple[Located, Any]]:
        try:
            values = from_json(self.before + self.data + self.after)
        except ValueError as error:
            raise InvalidByteRange from error
        place = _LazyPlace(self.file, byte_range=self)
        for place.row, value in enumerate(values):
            yield place, value

    def _lines(self) -> Iterator[tuple[Located, Any]]:
        place = _LazyPlace(self.file)
        for place.line, line in enumerate(self.data.split(b"\n"), start=self.line):
            if line and not line.isspace():
                yield place, parse_line(place, line)

    @cached_property
    def places(self) -> list[tuple[int, int | None]]:
        """Line and column of each row of an array, as in a Place. Computed on demand: only rows with a problem need
        it."""
        with self.file.open("rb") as stream:
            stream.seek(max(self.begin - MAX_ROW_BYTES, 0))  # columns in a longer line are of no use
            before = stream.read(min(self.begin, MAX_ROW_BYTES)).rpartition(b"\n")[2]
        lead = before.decode("utf-8-sig", errors="ignore")
        text = lead + self.data.decode() + self.after.decode()
        positions: list[tuple[int, int | None]] = []
        decoder, at, line, line_at = json.JSONDecoder(), len(lead), self.line, 0
        while (start := _after_separator(text, at)) < len(text) and text[start] != "]":
            line, line_at = (
                line + text.count("\n", line_at, start),
                max(line_at, text.rfind("\n", line_at, start) + 1),
            )
            positions.append((line, start - line_at + 1 if text[line_at:start].strip() else None))
            _, at = decoder.raw_decode(text, start)
        return positions


def _after_separator(text: str, at: int) -> int:
    separator = ELEMENT_SEPARATOR.match(text, at)
    assert separator is not None  # it also matches nothing
    return separator.end()


@dataclass
class _LazyPlace:
    """Like a Place, but moved from row to row, and computed only when it is reported."""

    file: Path
    row: int = 0
    line: int | None = None
    byte_range: ByteRange | None = None

    def __str__(self) -> str:
        line, column = self.byte_range.places[self.row] if self.byte_range else (self.line, None)
        return f"{self.file.name}:{line}:{column}" if column or not line else name_of_line(self.file, line)


@dataclass(frozen=True)
class ParsedRows:
    """Rows that had to be parsed to be found, with Problems in the place of what is not a row."""

    entries: tuple[Entry, ...]

    def rows(self, on_bad: OnBad) -> Iterator[tuple[Located, Row]]:
        return valid_rows(self.entries, on_bad)


Block = ByteRange | ParsedRows


def blocks(file: Path, encoding: str = "") -> Iterator[Block]:
    """The blocks of a file, in order. If one of them raises InvalidByteRange, `row_by_row` yields the rest.

    `encoding`: the encoding chosen by a person; without it, it is detected.
    """
    codec = encoding_of(file, encoding).codec if file.suffix.lower() in (".json", ".jsonl") else ""
    shape = json_layout.layout(file, encoding).shape if codec in ("utf-8", "utf-8-sig") else ""
    if shape not in ("lines", "array"):
        return row_by_row(file, encoding=encoding)
    skipped = len(codecs.BOM_UTF8) if codec == "utf-8-sig" else 0
    with file.open("rb") as stream:
        stream.seek(skipped)
        start = stream.read(1 << 16)
    if shape == "lines":
        return _byte_ranges(file, skipped, 1)
    first_row = FIRST_ROW_START.match(start)
    if not first_row:  # an empty array, or one without rows
        return row_by_row(file, encoding=encoding)
    return _byte_ranges(file, skipped + first_row.start(1), 1 + start.count(b"\n", 0, first_row.start(1)), first_row[1])


def row_by_row(file: Path, skip: int = 0, encoding: str = "") -> Iterator[ParsedRows]:
    """A file as its reader reads it, without the first `skip` entries."""
    some: list[Entry] = []
    size = 0
    for entry in islice(entries(file, encoding=encoding), skip, None):
        some.append(entry)
        size += _approximate_size(entry[1])
        if len(some) == MAX_BLOCK_ROWS or size >= CHUNK_BYTES:
            yield ParsedRows(tuple(some))
            some, size = [], 0
    if some:
        yield ParsedRows(tuple(some))


def _approximate_size(value: Any) -> int:
    """The approximate number of characters of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 1
    return sum(map(_approximate_size, value))


def _byte_ranges(file: Path, begin: int, line: int, row: bytes = b"") -> Iterator[ByteRange]:
    """Byte ranges of about BLOCK_BYTES, of lines or of an array whose rows begin with `row`."""
    before, after = (b"[", b"]") if row else (b"", b"")
    with file.open("rb") as stream:
        stream.seek(begin)
        rest = b""
        while more := stream.read(max(CHUNK_BYTES, len(rest))):
            rest += more
            end = _last_comma(rest, row) if row else rest.rfind(b"\n")
            if end >= 0:
                yield ByteRange(file, begin, begin + end, line, before, after)
                begin, line, rest = begin + end + 1, line + rest.count(b"\n", 0, end + 1), rest[end + 1 :]
            elif len(rest) > MAX_ROW_BYTES:
                yield ByteRange(file, begin, begin, line, b"[")  # broken
                return
    if rest:
        yield ByteRange(file, begin, begin + len(rest), line, before)


def _last_comma(data: bytes, row: bytes) -> int:
    """The position of the comma before the last row; -1 if there is none."""
    start = data.rfind(row, 1)
    while start > 0:
        comma = len(data[max(start - 256, 0) : start].rstrip()) + max(start - 256, 0) - 1
        if comma >= 0 and data[comma] == ord(","):
            return comma
        start = data.rfind(row, 1, start)
    return -1
