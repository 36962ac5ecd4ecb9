"""Lines of a data file with their places, and problems at places where no row can be read.

Only the current line is in memory, and at most MAX_ROW_BYTES of it. The meaning of lines is left to the readers:
`engine.data.json_files`, `engine.data.csv_files` and `engine.data.row_files`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from engine.core.problems import Problem, problem
from engine.data.encodings import UNDECODABLE_MARK, open_utf8, version
from engine.data.sheet_rows import place_in_sheet

MAX_ROW_BYTES = 64 << 20  # bytes of one row, as UTF-8
BUFFER_BYTES = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: its number in its file, from 1, and its line, from 1, if the file has lines.

    `column`, from 1, is where it begins in that line, if it is not the first thing there: an array of rows may be on
    one line. `at` is where reading can continue: bytes from the start of the file, as UTF-8.
    """

    file: Path
    row: int
    line: int | None = None
    column: int | None = None
    at: int = 0

    def __str__(self) -> str:
        if self.column:
            return f"{self.file.name}:{self.line}:{self.column} (#{self.row})"
        return name_of_line(self.file, self.line) if self.line else f"{self.file.name}#{self.row}"


def name_of_line(file: Path, line: int) -> str:
    """A line in messages; of a converted workbook, the row of the sheet, which is what its owner can see."""
    return place_in_sheet(file, line) or f"{file.name}:{line}"


class Located(Protocol):
    """The place of a row in messages: a Place, or something like it."""

    @property
    def file(self) -> Path: ...
    @property
    def row(self) -> int: ...
    @property
    def line(self) -> int | None: ...


Row = dict[str, Any]
Entry = tuple[Place, Any]  # an entry in the place of a row: the row itself, or the Problem with it
OnBad = Callable[[Problem], None]


def lines(
    file: Path, line: int, at: int, encoding: str = "", stop_at_cr: bool = False
) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Number, beginning, end and text of every line; None for the text of a line that is too long.

    `stop_at_cr`: a carriage return alone also ends a line, as in tables written by old programs.
    """
    with open_utf8(file, at, encoding) as stream:
        at = at or (stream.tell() if stream.seekable() else 0)
        if stop_at_cr and _ends_in_cr(file, encoding, *version(file)):
            stream = io.BufferedReader(_CarriageReturnsAsNewlines(stream), BUFFER_BYTES)
        while text := stream.readline(MAX_ROW_BYTES):
            size, whole = len(text), len(text) < MAX_ROW_BYTES or text.endswith(b"\n")
            while not whole:
                more = stream.readline(BUFFER_BYTES)
                size, whole = size + len(more), len(more) < BUFFER_BYTES or more.endswith(b"\n")
            if stop_at_cr and 0 <= text.find(b"\r") < size - 2 and size <= MAX_ROW_BYTES:
                for piece in text.splitlines(keepends=True):
                    yield line, at, at + len(piece), piece
                    line, at = line + 1, at + len(piece)
                continue
            yield line, at, at + size, text if size <= MAX_ROW_BYTES else None
            line, at = line + 1, at + size


class _CarriageReturnsAsNewlines(io.RawIOBase):
    """The bytes of a stream with a line feed in place of every carriage return."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        block = self.stream.read(len(into)).replace(b"\r", b"\n")
        into[: len(block)] = block
        return len(block)


@lru_cache(maxsize=1024)
def _ends_in_cr(file: Path, encoding: str, mtime_ns: int, size: int) -> bool:
    """Whether the lines of a file end in a carriage return alone, judged by its beginning."""
    with open_utf8(file, 0, encoding) as stream:
        start = stream.read(BUFFER_BYTES)
    return b"\r" in start and b"\n" not in start


def nonblank_lines(
    file: Path, row: int, line: int, at: int, encoding: str = ""
) -> Iterator[tuple[int, int, int, bytes | None]]:
    """The lines that are not blank, with the number of their row."""
    for number, begins, _, text in lines(file, line, at, encoding):
        if text is None or not text.isspace():
            yield row, number, begins, text
            row += 1


def too_long_problem(place: Place) -> Problem:
    return problem("row-too-long", place=str(place), limit=f"{MAX_ROW_BYTES >> 20} MB")


def undecodable_problem(place: Place, encoding: str) -> Problem:
    """The problem of a row with bytes that do not belong to its file's encoding, given by its common name."""
    return problem("row-bytes", place=str(place), encoding=encoding)


def holds_undecodable(text: str) -> bool:
    return not text.isascii() and UNDECODABLE_MARK.search(text) is not None


def half_character(value: Any, written: str | bytes) -> str | None:
    """The first half character in a value, as JSON writes it: "\\ud83d" alone, which nothing can be trained on.
    `written` is the JSON of the value."""
    if isinstance(written, bytes):
        escaped = b"\\ud" in written or b"\\uD" in written
    else:
        escaped = "\\ud" in written or "\\uD" in written
    if escaped:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return ascii(error.object[error.start]).strip("'")
        except RecursionError:
            return None
    return None


def not_a_row(place: Located, value: Any) -> Problem:
    """The problem of something that is not an object."""
    return problem("row-type", place=str(place), expected="object", found=type_of(value))


def type_of(value: Any) -> str:
    """The JSON name of its type."""
    words = {str: "string", bool: "true/false", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)
