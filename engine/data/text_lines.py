"""Lines of a data file with their places, and what is said of a place where no row can be read.

Nothing is held but the line at hand, and of that no more than MAX_ROW_BYTES. What the lines mean is left to the
readers: `engine.data.json_files`, `engine.data.csv_files` and `engine.data.row_files`.
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

MAX_ROW_BYTES = 64 << 20  # bytes of one row, as UTF-8
BUFFER_BYTES = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: its number from 1 in its file, and its line from 1 where the file has lines.

    `column`, from 1, is where it begins in that line, if it is not the first thing there: an array of rows may be
    written in one line. `at` is where reading can go on with it: bytes from the start of the file, taken as UTF-8.
    """

    file: Path
    row: int
    line: int | None = None
    column: int | None = None
    at: int = 0

    def __str__(self) -> str:
        if self.column:
            return f"{self.file.name}:{self.line}:{self.column} (#{self.row})"
        return f"{self.file.name}:{self.line}" if self.line else f"{self.file.name}#{self.row}"


class Located(Protocol):
    """What a row is told to be at: a Place, or something like it."""

    @property
    def file(self) -> Path: ...
    @property
    def row(self) -> int: ...
    @property
    def line(self) -> int | None: ...


Row = dict[str, Any]
Entry = tuple[Place, Any]  # what stands where a row should: a row, one hopes, or the Problem in its place
OnBad = Callable[[Problem], None]


def lines(
    file: Path, line: int, at: int, encoding: str = "", stop_at_cr: bool = False
) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Number, beginning, end and text of every line; None for the text of one that is too long to be held.

    `stop_at_cr`: a carriage return alone ends a line too, as in tables that old programs wrote.
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
    """The bytes of a stream with a line feed in the place of every carriage return."""

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
    """Whether the lines of a file end in a carriage return alone, going by its beginning."""
    with open_utf8(file, 0, encoding) as stream:
        start = stream.read(BUFFER_BYTES)
    return b"\r" in start and b"\n" not in start


def nonblank_lines(
    file: Path, row: int, line: int, at: int, encoding: str = ""
) -> Iterator[tuple[int, int, int, bytes | None]]:
    """The lines that are not blank, with the number of the row that each is."""
    for number, begins, _, text in lines(file, line, at, encoding):
        if text is None or not text.isspace():
            yield row, number, begins, text
            row += 1


def too_long_problem(place: Place) -> Problem:
    return problem("row-too-long", place=str(place), limit=f"{MAX_ROW_BYTES >> 20} MB")


def undecodable_problem(place: Place, encoding: str) -> Problem:
    """What to say of a row with bytes that are not of its file's encoding, called as people know it."""
    return problem("row-bytes", place=str(place), encoding=encoding)


def holds_undecodable(text: str) -> bool:
    return not text.isascii() and UNDECODABLE_MARK.search(text) is not None


def half_character(value: Any, written: str | bytes) -> str | None:
    """The first half of a character in a value, as JSON has it: "\\ud83d" alone, which nothing can be trained on.
    `written` is the JSON that the value was."""
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
    """What to say of something that is no object."""
    return problem("row-type", place=str(place), expected="object", found=type_of(value))


def type_of(value: Any) -> str:
    """The word JSON has for it."""
    words = {str: "string", bool: "true/false", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)
