"""A file of JSON → its rows, whichever way it is laid out.

Rows one per line, a list of rows, objects one after the other, an object that holds the list under some key (the
answer of a data set server included), columns as pandas writes them, or an object that is a row itself. What a file is
laid out like is found in its beginning (`layout`), and proved by whoever reads it on. Lists and lines are read row by
row, so a file of any size fits into memory; what has to be read whole may have LONGEST bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine import jsonshapes, textlines
from engine.encodings import encoding_of, open_utf8, version
from engine.problems import Problem, problem
from engine.textlines import (
    Entry,
    Place,
    full_lines,
    half_character,
    holds_undecodable,
    no_row,
    too_long,
    undecodable,
)

SPACE = re.compile(r"[ \t\r\n\ufeff]*")
LINES_END = 1 << 15  # bytes of a beginning that may not be all of the file
LOOKED_AT = 20  # lines by which lines are told from something else
decode_next = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Layout:
    """How a file is laid out: a key of READERS.

    `at`: the byte behind the bracket that opens the list of rows, which stands under `key`; `line` and `column` there.
    `inside`: the key under which each element holds its row. `problem`: why no row can be read.
    """

    shape: str
    key: str = ""
    inside: str = ""
    at: int = 0
    line: int = 1
    column: int = 1
    problem: Problem | None = None


def layout(file: Path, encoding: str = "") -> Layout:
    """How the file is laid out; remembered until it changes. Raises Refusal if it cannot be decoded."""
    return _layout(file, encoding, *version(file))


@lru_cache(maxsize=1024)
def _layout(file: Path, encoding: str, mtime_ns: int, size: int) -> Layout:
    start = _beginning(file, encoding)
    if start.startswith(b"["):
        return _layout_of_list(file, start)
    some = list(islice(full_lines(file, 1, 1, 0, encoding), LOOKED_AT + 1))
    values = [_object(text) for _, _, _, text in some]
    if not some or (values[0] is not None and len(some) > 1):
        whole = None not in values or not _values_follow(file, encoding)
        return Layout("lines" if whole else "values")
    if start.startswith(b"{"):
        good = sum(value is not None for value in values[1:])
        return _layout_of_object(file, encoding, good * 2 >= len(values))
    if any(value is not None for value in values) or some[0][3] is None:
        return Layout("lines")
    return Layout("none", problem=_no_json(file, some[0]))


def _beginning(file: Path, encoding: str) -> bytes:
    """The first bytes that are not blank."""
    with open_utf8(file, 0, encoding) as stream:
        while block := stream.read(1 << 16):
            if block := block.lstrip():
                return block
    return b""


def _object(line: bytes | None) -> dict[str, Any] | None:
    value = of_line("", line) if line else None
    return value if isinstance(value, dict) else None


def _values_follow(file: Path, encoding: str) -> bool:
    """Whether a file begins with several values one after the other, wherever their lines end."""
    with open_utf8(file, 0, encoding) as stream:
        text = stream.read(textlines.BUFFER).decode(errors="ignore")
    at, seen = 0, 0
    try:
        while seen < LOOKED_AT:
            begins, _, at = _next_value(text, at, not seen)
            if begins is None:
                break
            seen += 1
    except (ValueError, RecursionError):
        return False
    return True


def _no_json(file: Path, line: tuple[int, int, int, bytes | None]) -> Problem:
    row, number, at, text = line
    value = of_line(Place(file, row, number, at=at), text or b"")
    if isinstance(value, Problem):
        values = {"line": number, "column": value.values.get("column", 1)}
        reason = value.values.get("reason", "not text")
        return problem("file-no-json", file=file.name, **values, reason=reason)
    return problem("file-json-no-objects", file=file.name, found=textlines.type_of(value))


def _layout_of_list(file: Path, start: bytes) -> Layout:
    some = [line for line in start.split(b"\n") if line.strip()]
    first, *others = some[:-1] if len(start) > LINES_END else some  # the last may be cut
    if others and others[0].lstrip().startswith(b"[") and isinstance(of_line("", first), list):
        return Layout("none", problem=problem("file-json-lists", file=file.name))
    return Layout("array")


def _layout_of_object(file: Path, encoding: str, lines_follow: bool) -> Layout:
    """Of a file that begins with an object which is not alone on its line, or alone in the file."""
    with open_utf8(file, 0, encoding) as stream:
        offset = stream.tell() if stream.seekable() else 0
        text = stream.read(textlines.LONGEST + 1).decode(errors="surrogateescape")
    begin = SPACE.match(text).end()
    try:
        value, end = decode_next(text, begin)
    except (ValueError, RecursionError) as error:
        if lines_follow:
            return Layout("lines")
        return _layout_of_cut(file, text, begin, offset, error)
    if SPACE.match(text, end).end() < len(text):
        return Layout("values")
    shape = jsonshapes.shape_of(value)
    if shape.code:
        return Layout("none", problem=problem(shape.code, file=file.name, **shape.values))
    if shape.name == "wrapped":
        return _layout_of_member(text, begin, offset, shape)
    return Layout(shape.name)


def _layout_of_cut(file: Path, text: str, begin: int, offset: int, error: Exception) -> Layout:
    """Of an object that is broken somewhere, or too long to be read whole: its list may be readable all the same."""
    before: dict[str, Any] = {}
    for key, start, value in members(text, begin):
        if value is None and (opening := re.compile(r"\[\s*\{").match(text, start)):
            try:
                first, _ = decode_next(text, opening.end() - 1)
            except (ValueError, RecursionError):
                break
            shape = jsonshapes.shape_of(before | {key: [first]})
            if shape.name == "wrapped" and shape.key == key:
                return _layout_of_member(text, begin, offset, shape)
            break
        before[key] = value
    if len(text) > textlines.LONGEST:
        limit = f"{textlines.LONGEST >> 20} MB"
        return Layout("none", problem=problem("file-json-large", file=file.name, limit=limit))
    if text.count("\n") == text[begin:].rstrip().count("\n") == 0:
        return Layout("lines")
    return Layout("none", problem=_broken(file, text, begin, error))


def _broken(file: Path, text: str, begin: int, error: Exception) -> Problem:
    at = error.pos if isinstance(error, json.JSONDecodeError) else begin
    line, column, _ = _moved(text[:at], 1, 1, 0)
    return problem("file-no-json", file=file.name, line=line, column=column, reason=_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number with too many digits"


def members(text: str, at: int) -> Iterator[tuple[str, int, Any]]:
    """Key, beginning and value of each member of the object at `at`; the value is None, and the last, where it is broken."""
    at = SPACE.match(text, at + 1).end()
    while text.startswith('"', at):
        try:
            key, at = decode_next(text, at)
        except ValueError:
            return
        at = SPACE.match(text, at).end()
        start = SPACE.match(text, at + 1).end()
        try:
            value, at = decode_next(text, start)
        except (ValueError, RecursionError):
            yield key, start, None
            return
        yield key, start, value
        at = SPACE.match(text, at).end()
        at = SPACE.match(text, at + 1).end() if text.startswith(",", at) else len(text)


def _layout_of_member(text: str, begin: int, offset: int, shape: jsonshapes.Shape) -> Layout:
    start = next(start for key, start, _ in members(text, begin) if key == shape.key)
    line, column, at = _moved(text[: start + 1], 1, 1, offset)
    return Layout("wrapped", shape.key, shape.inside, at, line, column)


# ---------------------------------------------------------------------------------------------- reading


def read(file: Path, start: Place, encoding: str = "") -> Iterator[Entry]:
    """The rows from `start` on. Raises Refusal if the file cannot be decoded."""
    how = layout(file, encoding)
    if how.problem:
        return iter([(start, how.problem)])
    return READERS[how.shape](file, start, encoding, how)


def _lines(file: Path, start: Place, encoding: str, _how: Layout) -> Iterator[Entry]:
    label = encoding_of(file, encoding).label
    for row, line, at, text in full_lines(file, start.row, start.line or 1, start.at, encoding):
        place = Place(file, row, line, at=at)
        yield place, too_long(place) if text is None else of_line(place, text, label)


def of_line(place: Any, line: bytes, label: str = "UTF-8") -> Any:
    """What a line of JSON holds, or the Problem with it. `place` is told as text; `label` is what people call the
    encoding of its file."""
    try:
        return from_json(line, cache_strings="keys")
    except ValueError:  # the other parser is kinder, and says better what is wrong
        pass
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return problem("row-not-json", place=str(place), column=error.colno, reason=error.msg)
    except UnicodeDecodeError:
        return undecodable(place, label)
    except (RecursionError, ValueError) as error:
        return problem("row-not-json", place=str(place), column=1, reason=_reason(error))
    return _without_halves(place, value, line)


def _without_halves(place: Any, value: Any, written: str | bytes) -> Any:
    """The value, or the Problem if its text holds half of a character."""
    half = half_character(value, written)
    return problem("row-half-character", place=str(place), found=half) if half else value


def _whole(file: Path, start: Place, encoding: str, how: Layout) -> Iterator[Entry]:
    """Rows of an object that is read whole."""
    with open_utf8(file, 0, encoding) as stream:
        text = stream.read(textlines.LONGEST + 1).decode(errors="surrogateescape")
    begin = SPACE.match(text).end()
    value, _ = decode_next(text, begin)
    halves, damaged = "\\ud" in text.lower(), holds_undecodable(text)
    line = 1 + text.count("\n", 0, begin) if how.shape == "row" else None
    rows = jsonshapes.ROWS[how.shape](value)
    for number, row in enumerate(islice(rows, start.row - 1, None), start=start.row):
        place = Place(file, number, line)
        if damaged and half_character(row, "\\ud"):
            yield place, undecodable(place, encoding_of(file, encoding).label)
        else:
            yield place, _without_halves(place, row, "\\ud") if halves else row


def _listed(file: Path, start: Place, encoding: str, how: Layout) -> Iterator[Entry]:
    """Elements of a list, or objects one after the other, decoded one by one from a buffer of text."""
    with open_utf8(file, start.at or how.at, encoding) as stream:
        walk = _Walk(file, start, encoding, how, stream)
        while (entry := walk.next()) is not None:
            yield entry
            if isinstance(entry[1], Problem) and walk.broken:
                return
        if left := walk.left_over():
            yield left


class _Walk:
    """Where the reading of a list is. `text[:counted]` is behind `line`, `column` and `at_byte`; `at` is the next."""

    def __init__(self, file: Path, start: Place, encoding: str, how: Layout, stream: Any):
        self.file, self.how, self.stream = file, how, stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.encoding = encoding_of(file, encoding)
        self.resumed, self.start = start.at > 0, start
        self.at_byte = start.at or how.at or (stream.tell() if stream.seekable() else 0)
        self.row, self.first, self.broken = start.row, True, False
        self.line = start.line or how.line
        self.column = (start.column if self.resumed else how.column) or 1
        self.text, self.at, self.counted = self.more(textlines.BUFFER), 0, 0
        if how.shape == "array" and not self.resumed:
            while not (opening := self.text.lstrip()):
                self.text += self.more(textlines.BUFFER)
            self.at = len(self.text) - len(opening) + 1

    def more(self, size: int) -> str:
        block = self.stream.read(size)
        return self.decoder.decode(block, final=len(block) < size)

    def move_to(self, at: int) -> None:
        """Count lines, columns and bytes up to there."""
        passed = self.text[self.counted : at]
        self.line, self.column, self.at_byte = _moved(passed, self.line, self.column, self.at_byte)
        self.counted = at

    def next(self) -> Entry | None:
        """The next row, or the Problem in its place; None at the end."""
        step = _next_value if self.how.shape == "values" else _next_in_array
        while True:
            ended = self.at
            try:
                begins, value, end = step(self.text, self.at, self.first)
                # A number at the end of the buffer may go on behind it.
                if end < len(self.text) or begins is None or not self._grow():
                    self.at = end
                    break
            except (ValueError, RecursionError) as error:
                if not self._cut_off(error) or not self._grow():
                    return self._failed(error)
        return None if begins is None else self._entry(ended, begins, value)

    def _cut_off(self, error: Exception) -> bool:
        """What looks like an error may be a row cut off at the end of the buffer."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or len(self.text) - error.pos < 16

    def _grow(self) -> bool:
        """Whether there is more text; the buffer never holds more than a row may have, and as much again."""
        held = len(self.text) - self.at
        if held > textlines.LONGEST or not (block := self.more(max(textlines.BUFFER, held))):
            return False
        self.move_to(self.at)
        self.text, self.at, self.counted = self.text[self.at :] + block, 0, 0
        return True

    def _failed(self, error: Exception) -> Entry:
        self.broken = True
        position = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        too_large = len(self.text) - self.at > textlines.LONGEST
        self.move_to(position)
        place = Place(self.file, self.row, self.line, at=self.at_byte)
        if too_large:
            limit = f"{textlines.LONGEST >> 20} MB"
            return place, problem("row-too-long-array", place=str(place), limit=limit)
        values = {"line": self.line, "column": self.column, "reason": _reason(error)}
        return place, problem("file-broken-json", file=self.file.name, **values)

    def _entry(self, ended: int, begins: int, value: Any) -> Entry:
        self.move_to(begins)
        newline = self.text.rfind("\n", ended, begins)
        alone = newline >= 0 and self.text[newline:begins].isspace()
        if self.first and (self.resumed or self.how.shape == "values"):
            alone = self.start.column is None
        place = Place(self.file, self.row, self.line, None if alone else self.column, self.at_byte)
        written = self.text[begins : self.at]
        self.row, self.first = self.row + 1, False
        if self.encoding.damaged and holds_undecodable(written):
            return place, undecodable(place, self.encoding.label)
        if inside := self.how.inside:
            if not isinstance(value, dict) or not isinstance(value.get(inside), dict):
                return place, no_row(place, value)
            value = value[inside]
        return place, _without_halves(place, value, written)

    def left_over(self) -> Entry | None:
        """What stands behind the end of the list, and was not read."""
        if self.how.shape == "values":
            return None
        while len(self.text) - self.at <= textlines.LONGEST and (block := self.more(textlines.BUFFER)):
            self.text += block
        rest = self.text[self.at + 1 :]
        start = SPACE.match(rest).end()
        fine = start == len(rest)
        if self.how.shape == "wrapped":
            fine = jsonshapes.is_tail(rest, self.how.inside)
        if fine:
            return None
        self.move_to(self.at + 1 + start)
        place = Place(self.file, self.row, self.line, at=self.at_byte)
        code = "file-json-more-wrapped" if self.how.shape == "wrapped" else "file-json-more"
        values = {"line": self.line, "column": self.column}
        return place, problem(code, file=self.file.name, **values)


def _moved(passed: str, line: int, column: int, at: int) -> tuple[int, int, int]:
    """Line, column and byte behind the text that was passed."""
    lines = passed.count("\n")
    column = len(passed) - passed.rfind("\n") if lines else column + len(passed)
    size = len(passed) if passed.isascii() else len(passed.encode(errors="surrogateescape"))
    return line + lines, column, at + size


def _next_in_array(text: str, at: int, first: bool) -> tuple[int | None, Any, int]:
    """Where the next element begins, the element, and where it ends; None for the beginning at the end of the array.

    Raises JSONDecodeError.
    """
    at = SPACE.match(text, at).end()
    if text.startswith("]", at):
        return None, None, at
    if not first:
        if not text.startswith(",", at):
            raise json.JSONDecodeError("',' or ']' expected", text, at)
        at = SPACE.match(text, at + 1).end()
    value, end = decode_next(text, at)
    return at, value, end


def _next_value(text: str, at: int, first: bool) -> tuple[int | None, Any, int]:
    """The same of values one after the other, with or without a comma in between."""
    at = SPACE.match(text, at).end()
    if not first and text.startswith(",", at):
        at = SPACE.match(text, at + 1).end()
    if at == len(text):
        return None, None, at
    value, end = decode_next(text, at)
    return at, value, end


READERS: dict[str, Callable[[Path, Place, str, Layout], Iterator[Entry]]] = {
    "lines": _lines, "array": _listed, "wrapped": _listed, "values": _listed,
    **dict.fromkeys(jsonshapes.ROWS, _whole),
}  # fmt: skip
