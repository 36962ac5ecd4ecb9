"""The layout of a JSON file, detected from its beginning: one row per line, a list, values one after another, or one
object.

Reading on proves it (`engine.data.json_files`). The meaning of a single object is decided by `engine.data.json_shapes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine.core.problems import Problem, problem
from engine.data import json_shapes, text_lines
from engine.data.encodings import open_utf8, version
from engine.data.text_lines import Place, half_character, nonblank_lines, undecodable_problem

SPACE = re.compile(r"[ \t\r\n\ufeff]*")
MAX_UNCUT_BYTES = 1 << 15  # bytes of the beginning, which may not be the whole file
LINES_SAMPLED = 20  # lines that are needed to recognize one value per line
decode_next = json.JSONDecoder().raw_decode


def after_space(text: str, at: int = 0) -> int:
    """The end of the whitespace at `at`; `at` itself if there is none."""
    space = SPACE.match(text, at)
    assert space is not None  # it also matches nothing
    return space.end()


@dataclass(frozen=True)
class Layout:
    """The layout of a file: a key of LAYOUT_READERS.

    `at`: the byte after the bracket that opens the list of rows, which is under `key`; `line` and `column` there.
    `inside`: the key under which each element has its row. `problem`: why no row can be read.
    """

    shape: str
    key: str = ""
    inside: str = ""
    at: int = 0
    line: int = 1
    column: int = 1
    problem: Problem | None = None


def layout(file: Path, encoding: str = "") -> Layout:
    """The layout of the file; cached until it changes. Raises Refusal if it cannot be decoded."""
    return _layout(file, encoding, *version(file))


@lru_cache(maxsize=1024)
def _layout(file: Path, encoding: str, mtime_ns: int, size: int) -> Layout:
    start = _first_bytes(file, encoding)
    if start.startswith(b"["):
        return _layout_of_list(file, start)
    some = list(islice(nonblank_lines(file, 1, 1, 0, encoding), LINES_SAMPLED + 1))
    values = [_parse_object(text) for _, _, _, text in some]
    if not some or (values[0] is not None and len(some) > 1):
        whole = None not in values or not _values_follow(file, encoding)
        return Layout("lines" if whole else "values")
    if start.startswith(b"{"):
        good = sum(value is not None for value in values[1:])
        return _layout_of_object(file, encoding, good * 2 >= len(values))
    if any(value is not None for value in values) or some[0][3] is None:
        return Layout("lines")
    return Layout("none", problem=_no_json_problem(file, some[0]))


def _first_bytes(file: Path, encoding: str) -> bytes:
    """The first bytes that are not blank."""
    with open_utf8(file, 0, encoding) as stream:
        while block := stream.read(1 << 16):
            if block := block.lstrip():
                return block
    return b""


def _parse_object(line: bytes | None) -> dict[str, Any] | None:
    value = parse_line("", line) if line else None
    return value if isinstance(value, dict) else None


def _values_follow(file: Path, encoding: str) -> bool:
    """Whether a file begins with several values one after another, wherever their lines end."""
    with open_utf8(file, 0, encoding) as stream:
        text = stream.read(text_lines.BUFFER_BYTES).decode(errors="ignore")
    at, seen = 0, 0
    try:
        while seen < LINES_SAMPLED:
            begins, _, at = next_value(text, at, not seen)
            if begins is None:
                break
            seen += 1
    except (ValueError, RecursionError):
        return False
    return True


def _no_json_problem(file: Path, line: tuple[int, int, int, bytes | None]) -> Problem:
    row, number, at, text = line
    value = parse_line(Place(file, row, number, at=at), text or b"")
    if isinstance(value, Problem):
        values = {"line": number, "column": value.values.get("column", 1)}
        reason = value.values.get("reason", "not text")
        return problem("file-no-json", file=file.name, **values, reason=reason)
    return problem("file-json-no-objects", file=file.name, found=text_lines.type_of(value))


def _layout_of_list(file: Path, start: bytes) -> Layout:
    some = [line for line in start.split(b"\n") if line.strip()]
    if len(start) > MAX_UNCUT_BYTES:
        some = some[:-1]  # it may be truncated
    first, *others = some or [b""]
    if others and others[0].lstrip().startswith(b"["):
        value = parse_line("", first)
        rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
        if isinstance(value, list) and not (rows and not json_shapes.is_conversation(value)):
            return Layout("none", problem=problem("file-json-lists", file=file.name))
    return Layout("array")


def _layout_of_object(file: Path, encoding: str, lines_follow: bool) -> Layout:
    """The layout of a file that begins with an object which is not alone on its line, or alone in the file."""
    with open_utf8(file, 0, encoding) as stream:
        offset = stream.tell() if stream.seekable() else 0
        text = stream.read(text_lines.MAX_ROW_BYTES + 1).decode(errors="surrogateescape")
    begin = after_space(text)
    try:
        value, end = decode_next(text, begin)
    except (ValueError, RecursionError) as error:
        if lines_follow:
            return Layout("lines")
        return _layout_of_broken_object(file, text, begin, offset, error)
    if after_space(text, end) < len(text):
        return Layout("values")
    shape = json_shapes.shape_of(value)
    if shape.code:
        return Layout("none", problem=problem(shape.code, file=file.name, **shape.values))
    if shape.name == "wrapped":
        return _layout_of_member(text, begin, offset, shape)
    return Layout(shape.name)


def _layout_of_broken_object(file: Path, text: str, begin: int, offset: int, error: Exception) -> Layout:
    """The layout of an object that is broken somewhere, or too long to be read as a whole: its list may still be
    readable."""
    before: dict[str, Any] = {}
    for key, start, value in object_members(text, begin):
        if value is None and (opening := re.compile(r"\[\s*\{").match(text, start)):
            try:
                first, _ = decode_next(text, opening.end() - 1)
            except (ValueError, RecursionError):
                break
            shape = json_shapes.shape_of(before | {key: [first]})
            if shape.name == "wrapped" and shape.key == key:
                return _layout_of_member(text, begin, offset, shape)
            break
        before[key] = value
    if len(text) > text_lines.MAX_ROW_BYTES:
        limit = f"{text_lines.MAX_ROW_BYTES >> 20} MB"
        return Layout("none", problem=problem("file-json-large", file=file.name, limit=limit))
    if text.count("\n") == text[begin:].rstrip().count("\n") == 0:
        return Layout("lines")
    return Layout("none", problem=_broken_problem(file, text, begin, error))


def _broken_problem(file: Path, text: str, begin: int, error: Exception) -> Problem:
    at = error.pos if isinstance(error, json.JSONDecodeError) else begin
    line, column, _ = advance_position(text[:at], 1, 1, 0)
    return problem("file-no-json", file=file.name, line=line, column=column, reason=parse_error_reason(error))


def parse_error_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number with too many digits"


def object_members(text: str, at: int) -> Iterator[tuple[str, int, Any]]:
    """Key, beginning and value of each member of the object at `at`. At the first broken member, the value is None and
    the iteration ends."""
    at = after_space(text, at + 1)
    while text.startswith('"', at):
        try:
            key, at = decode_next(text, at)
        except ValueError:
            return
        at = after_space(text, at)
        start = after_space(text, at + 1)
        try:
            value, at = decode_next(text, start)
        except (ValueError, RecursionError):
            yield key, start, None
            return
        yield key, start, value
        at = after_space(text, at)
        at = after_space(text, at + 1) if text.startswith(",", at) else len(text)


def _layout_of_member(text: str, begin: int, offset: int, shape: json_shapes.Shape) -> Layout:
    start = next(start for key, start, _ in object_members(text, begin) if key == shape.key)
    line, column, at = advance_position(text[: start + 1], 1, 1, offset)
    return Layout("wrapped", shape.key, shape.inside, at, line, column)


# ------------------------------------------------------------------------------------------------- values


def parse_line(place: Any, line: bytes, label: str = "UTF-8") -> Any:
    """The value of a line of JSON, or the Problem with it. `place` is reported as text; `label` is the common name of
    the file's encoding."""
    try:
        return from_json(line, cache_strings="keys")
    except ValueError:  # the other parser is more tolerant, and has better messages
        pass
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return problem("row-not-json", place=str(place), column=error.colno, reason=error.msg)
    except UnicodeDecodeError:
        return undecodable_problem(place, label)
    except (RecursionError, ValueError) as error:
        return problem("row-not-json", place=str(place), column=1, reason=parse_error_reason(error))
    return reject_half_characters(place, value, line)


def reject_half_characters(place: Any, value: Any, written: str | bytes) -> Any:
    """The value, or the Problem if its text contains half a character."""
    half = half_character(value, written)
    return problem("row-half-character", place=str(place), found=half) if half else value


def advance_position(passed: str, line: int, column: int, at: int) -> tuple[int, int, int]:
    """Line, column and byte after the text that was passed."""
    lines = passed.count("\n")
    column = len(passed) - passed.rfind("\n") if lines else column + len(passed)
    size = len(passed) if passed.isascii() else len(passed.encode(errors="surrogateescape"))
    return line + lines, column, at + size


def next_value(text: str, at: int, first: bool) -> tuple[int | None, Any, int]:
    """Where the next value begins, the value, and where it ends, for values one after another, with or without commas
    between them; None for the beginning at the end. Raises ValueError or RecursionError."""
    at = after_space(text, at)
    if not first and text.startswith(",", at):
        at = after_space(text, at + 1)
    if at == len(text):
        return None, None, at
    value, end = decode_next(text, at)
    return at, value, end
