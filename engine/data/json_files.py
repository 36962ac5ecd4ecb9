"""A JSON file → its rows, in any layout (`engine.data.json_layout`).

Lists and lines are read row by row, so files of any size fit into memory; what has to be read as a whole is limited to
MAX_ROW_BYTES bytes. The meaning of a row is left to `engine.data.datasets`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.data import json_shapes, text_lines
from engine.data.encodings import encoding_of, open_utf8
from engine.data.json_layout import (
    Layout,
    advance_position,
    after_space,
    decode_next,
    layout,
    next_value,
    parse_error_reason,
    parse_line,
    reject_half_characters,
)
from engine.data.text_lines import (
    Entry,
    Place,
    half_character,
    holds_undecodable,
    nonblank_lines,
    not_a_row,
    too_long_problem,
    undecodable_problem,
)


def read(file: Path, start: Place, encoding: str = "") -> Iterator[Entry]:
    """The rows from `start` on. Raises Refusal if the file cannot be decoded."""
    file_layout = layout(file, encoding)
    if file_layout.problem:
        return iter([(start, file_layout.problem)])
    return LAYOUT_READERS[file_layout.shape](file, start, encoding, file_layout)


def _read_lines(file: Path, start: Place, encoding: str, _layout: Layout) -> Iterator[Entry]:
    label = encoding_of(file, encoding).label
    for row, line, at, text in nonblank_lines(file, start.row, start.line or 1, start.at, encoding):
        place = Place(file, row, line, at=at)
        yield place, too_long_problem(place) if text is None else parse_line(place, text, label)


def _read_object(file: Path, start: Place, encoding: str, file_layout: Layout) -> Iterator[Entry]:
    """The rows of an object that is read as a whole."""
    with open_utf8(file, 0, encoding) as stream:
        text = stream.read(text_lines.MAX_ROW_BYTES + 1).decode(errors="surrogateescape")
    begin = after_space(text)
    value, _ = decode_next(text, begin)
    halves, damaged = "\\ud" in text.lower(), holds_undecodable(text)
    line = 1 + text.count("\n", 0, begin) if file_layout.shape == "row" else None
    rows = json_shapes.ROW_ITERATORS[file_layout.shape](value)
    for number, row in enumerate(islice(rows, start.row - 1, None), start=start.row):
        place = Place(file, number, line)
        if damaged and half_character(row, "\\ud"):
            yield place, undecodable_problem(place, encoding_of(file, encoding).label)
        else:
            yield place, reject_half_characters(place, row, "\\ud") if halves else row


def _read_list(file: Path, start: Place, encoding: str, file_layout: Layout) -> Iterator[Entry]:
    """Elements of a list, or objects one after another, decoded one by one from a text buffer."""
    with open_utf8(file, start.at or file_layout.at, encoding) as stream:
        walk = _ListReader(file, start, encoding, file_layout, stream)
        while (entry := walk.next()) is not None:
            yield entry
            if isinstance(entry[1], Problem) and walk.broken:
                return
        if left := walk.left_over():
            yield left


class _ListReader:
    """The reading position in a list. `text[:counted]` is before `line`, `column` and `at_byte`; `at` is the next
    element."""

    def __init__(self, file: Path, start: Place, encoding: str, file_layout: Layout, stream: Any):
        self.file, self.layout, self.stream = file, file_layout, stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.encoding = encoding_of(file, encoding)
        self.resumed, self.start = start.at > 0, start
        self.at_byte = start.at or file_layout.at or (stream.tell() if stream.seekable() else 0)
        self.row, self.first, self.broken = start.row, True, False
        self.line = start.line or file_layout.line
        self.column = (start.column if self.resumed else file_layout.column) or 1
        self.text, self.at, self.counted = self.more(text_lines.BUFFER_BYTES), 0, 0
        if file_layout.shape == "array" and not self.resumed:
            while not (opening := self.text.lstrip()):
                self.text += self.more(text_lines.BUFFER_BYTES)
            self.at = len(self.text) - len(opening) + 1

    def more(self, size: int) -> str:
        block = self.stream.read(size)
        return self.decoder.decode(block, final=len(block) < size)

    def move_to(self, at: int) -> None:
        """Count lines, columns and bytes up to there."""
        passed = self.text[self.counted : at]
        self.line, self.column, self.at_byte = advance_position(passed, self.line, self.column, self.at_byte)
        self.counted = at

    def next(self) -> Entry | None:
        """The next row, or the Problem in its place; None at the end."""
        step = next_value if self.layout.shape == "values" else _next_in_array
        while True:
            ended = self.at
            try:
                begins, value, end = step(self.text, self.at, self.first)
                # A number at the end of the buffer may continue after it.
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
        """Whether there is more text; the buffer never holds more than twice the maximum of a row."""
        held = len(self.text) - self.at
        if held > text_lines.MAX_ROW_BYTES or not (block := self.more(max(text_lines.BUFFER_BYTES, held))):
            return False
        self.move_to(self.at)
        self.text, self.at, self.counted = self.text[self.at :] + block, 0, 0
        return True

    def _failed(self, error: Exception) -> Entry:
        self.broken = True
        position = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        too_large = len(self.text) - self.at > text_lines.MAX_ROW_BYTES
        self.move_to(position)
        place = Place(self.file, self.row, self.line, at=self.at_byte)
        if too_large:
            limit = f"{text_lines.MAX_ROW_BYTES >> 20} MB"
            return place, problem("row-too-long-array", place=str(place), limit=limit)
        values = {"line": self.line, "column": self.column, "reason": parse_error_reason(error)}
        return place, problem("file-broken-json", file=self.file.name, **values)

    def _entry(self, ended: int, begins: int, value: Any) -> Entry:
        self.move_to(begins)
        newline = self.text.rfind("\n", ended, begins)
        alone = newline >= 0 and self.text[newline:begins].isspace()
        if self.first and (self.resumed or self.layout.shape == "values"):
            alone = self.start.column is None
        place = Place(self.file, self.row, self.line, None if alone else self.column, self.at_byte)
        written = self.text[begins : self.at]
        self.row, self.first = self.row + 1, False
        if self.encoding.damaged and holds_undecodable(written):
            return place, undecodable_problem(place, self.encoding.label)
        if inside := self.layout.inside:
            if not isinstance(value, dict) or not isinstance(value.get(inside), dict):
                return place, not_a_row(place, value)
            value = value[inside]
        return place, reject_half_characters(place, value, written)

    def left_over(self) -> Entry | None:
        """Report content after the end of the list, which was not read."""
        if self.layout.shape == "values":
            return None
        while len(self.text) - self.at <= text_lines.MAX_ROW_BYTES and (block := self.more(text_lines.BUFFER_BYTES)):
            self.text += block
        rest = self.text[self.at + 1 :]
        start = after_space(rest)
        fine = start == len(rest)
        if self.layout.shape == "wrapped":
            fine = json_shapes.is_closing(rest, self.layout.inside)
        if fine:
            return None
        self.move_to(self.at + 1 + start)
        place = Place(self.file, self.row, self.line, at=self.at_byte)
        code = "file-json-more-wrapped" if self.layout.shape == "wrapped" else "file-json-more"
        values = {"line": self.line, "column": self.column}
        return place, problem(code, file=self.file.name, **values)


def _next_in_array(text: str, at: int, first: bool) -> tuple[int | None, Any, int]:
    """Where the next element begins, the element, and where it ends; None for the beginning at the end of the array.

    Raises JSONDecodeError.
    """
    at = after_space(text, at)
    if text.startswith("]", at):
        return None, None, at
    if not first:
        if not text.startswith(",", at):
            raise json.JSONDecodeError("',' or ']' expected", text, at)
        at = after_space(text, at + 1)
    value, end = decode_next(text, at)
    return at, value, end


LAYOUT_READERS: dict[str, Callable[[Path, Place, str, Layout], Iterator[Entry]]] = {
    "lines": _read_lines,
    "array": _read_list,
    "wrapped": _read_list,
    "values": _read_list,
    **dict.fromkeys(json_shapes.ROW_ITERATORS, _read_object),
}
