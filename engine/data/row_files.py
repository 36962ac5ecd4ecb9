"""A data file → its rows, one after another, starting at any place in it.

It reads json, jsonl, csv, tsv, parquet and txt, in any encoding of `engine.data.encodings`. Only the current row is in
memory, and at most MAX_ROW_BYTES of it, so files of any size and lines of any length can be read. What cannot be read
as a row becomes a Problem in its place. The meaning of a row is left to `engine.data.datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from engine.core.problems import Problem, Refusal, problem
from engine.data import csv_files, json_files, json_layout, text_lines
from engine.data.encodings import Encoding, encoding_of, open_utf8, read_text, version
from engine.data.text_lines import (
    Entry,
    Located,
    OnBad,
    Place,
    Row,
    half_character,
    holds_undecodable,
    lines,
    nonblank_lines,
    not_a_row,
    too_long_problem,
    type_of,
    undecodable_problem,
)

__all__ = [
    "PLACE_INTERVAL_ROWS",
    "SUFFIXES",
    "Entry",
    "FileSource",
    "OnBad",
    "Place",
    "Row",
    "count",
    "entries",
    "half_character",
    "json_error_location",
    "not_a_row",
    "places",
    "read_text",
    "source_of",
    "truncation_problem",
    "type_of",
    "valid_rows",
    "version",
]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
PLACE_INTERVAL_ROWS = 256  # rows between two remembered places


def entries(file: Path, start: Place | None = None, encoding: str = "") -> Iterator[Entry]:
    """The rows of a file, each with its place, from `start` on if given: a place that this function has yielded before.

    `encoding`: the encoding chosen by a person; without it, it is detected. A row that cannot be read is replaced by a
    Problem; the last entry may be a Problem of the file itself.
    """
    start = start or Place(file, 1)
    try:
        for place, row in READERS[file.suffix.lower()](file, start, encoding):
            yield place, row if isinstance(row, (dict, Problem)) else not_a_row(place, row)
    except Refusal as refusal:
        yield start, refusal.problems[0]
    except OSError as error:
        yield start, problem("data-file-unreadable", file=file.name, why=error.strerror or error)


AnyPlace = TypeVar("AnyPlace", bound=Located)


def valid_rows(values: Iterable[tuple[AnyPlace, Any]], on_bad: OnBad) -> Iterator[tuple[AnyPlace, Row]]:
    """The valid rows; the others go to `on_bad`."""
    for place, row in values:
        if isinstance(row, dict):
            yield place, row
        else:
            on_bad(row if isinstance(row, Problem) else not_a_row(place, row))


@dataclass(frozen=True)
class FileSource:
    """How a file is read: its encoding (None for Parquet), its layout or separator, and what is uncertain: Problems
    that a person should know about before anything is trained on it."""

    file: Path
    encoding: Encoding | None = None
    layout: str = ""
    separator: str = ""
    doubts: tuple[Problem, ...] = ()


def source_of(file: Path, encoding: str = "") -> FileSource:
    """How the file is read; cached until it changes. Raises Refusal if it cannot be read at all."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            _parquet_file(file)
            return FileSource(file)
        detected = encoding_of(file, encoding)
        doubts: tuple[Problem, ...] = ()
        if not detected.sure:
            others = ", ".join(detected.others[:3])
            doubts += (problem("encoding-unsure", file=file.name, encoding=detected.label, others=others),)
        if suffix in (".json", ".jsonl"):
            return FileSource(file, detected, json_layout.layout(file, encoding).shape, doubts=doubts)
        if suffix in (".csv", ".tsv"):
            table_dialect = csv_files.dialect(file, encoding)
            return FileSource(file, detected, separator=table_dialect.label, doubts=(*doubts, *table_dialect.doubts))
        return FileSource(file, detected, doubts=doubts)
    except OSError as error:
        why = error.strerror or error
        raise Refusal(problem("data-file-unreadable", file=file.name, why=why)) from error


def json_error_location(error: Exception) -> dict[str, Any]:
    """Line, column and reason of a JSON error, for a sentence."""
    if isinstance(error, json.JSONDecodeError):
        return {"line": error.lineno, "column": error.colno, "reason": error.msg}
    return {"line": 1, "column": 1, "reason": json_layout.parse_error_reason(error)}


def places(file: Path, encoding: str = "") -> tuple[list[Place], int]:
    """The place of every PLACE_INTERVAL_ROWS-th row, the first one first, and the number of rows, good or bad.

    Reads the file once, and is cached until it changes.
    """
    return _places(file, encoding, *version(file))


def count(file: Path, encoding: str = "") -> int:
    """The number of rows, good or bad; cached until the file changes. Raises Refusal if it is not a data file."""
    return _count(file, encoding, *version(file))


def truncation_problem(file: Path) -> Problem | None:
    """Report if a JSON file ends in the middle of a row, and how many rows before that can be read. Reads all of it."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return None
    before: Place | None = None
    last: Place | None = None
    rows, value = 0, None
    for place, value in entries(file):
        before, last, rows = last, place, rows + isinstance(value, dict)
    codes = ("row-not-json", "file-broken-json", "row-bytes")
    if not rows or not isinstance(value, Problem) or value.code not in codes:
        return None  # complete; or no row can be read, which is reported when its columns are read
    # Where it is broken is known only from the beginning of a row: in a list, from the previous one.
    in_list = json_layout.layout(file).shape in ("array", "wrapped")
    opening, start = (b"[", before) if in_list else (b"", last)
    assert start is not None  # a complete row came before the broken part
    assert last is not None
    with open_utf8(file, start.at) as stream:
        rest = (opening + stream.read(2 * text_lines.MAX_ROW_BYTES)).decode(errors="replace")
    try:
        from_json(rest)
    except ValueError as error:
        if str(error).startswith("EOF while parsing"):
            return problem("file-breaks-off", file=file.name, line=last.line, rows=rows)
    return None


@lru_cache(maxsize=64)
def _places(file: Path, encoding: str, mtime_ns: int, size: int) -> tuple[list[Place], int]:
    remembered, number = [], 0
    if is_json_lines(file, encoding):
        for number, line, at, _ in nonblank_lines(file, 1, 1, 0, encoding):
            if number % PLACE_INTERVAL_ROWS == 1:
                remembered.append(Place(file, number, line, at=at))
    else:
        for number, (place, _) in enumerate(entries(file, encoding=encoding), start=1):
            if number % PLACE_INTERVAL_ROWS == 1:
                remembered.append(place)
    return remembered, number


@lru_cache(maxsize=1024)
def _count(file: Path, encoding: str, mtime_ns: int, size: int) -> int:
    if file.suffix.lower() == ".parquet":
        return _parquet_file(file).metadata.num_rows
    encoding_of(file, encoding)
    return _places(file, encoding, mtime_ns, size)[1]


def is_json_lines(file: Path, encoding: str = "") -> bool:
    """Whether every line is a row of JSON: .json and .jsonl are often confused in file names."""
    return file.suffix.lower() in (".json", ".jsonl") and json_layout.layout(file, encoding).shape == "lines"


# ------------------------------------------------------------------------------------------ other files


def _parquet_file(file: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise Refusal(problem("file-broken-parquet", file=file.name, reason=str(error))) from error


def _read_parquet(file: Path, start: Place, _encoding: str) -> Iterator[Entry]:
    from pyarrow import ArrowException

    table, row = _parquet_file(file), 1
    try:
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size <= start.row:
                row += size
                continue
            for batch in table.iter_batches(batch_size=PLACE_INTERVAL_ROWS, row_groups=[group]):
                if row + batch.num_rows > start.row:
                    for number, value in enumerate(batch.to_pylist(), start=row):
                        if number >= start.row:
                            yield Place(file, number), value
                row += batch.num_rows
    except (ArrowException, OSError) as error:
        yield Place(file, row), problem("file-broken-parquet", file=file.name, reason=str(error))


def _read_paragraphs(file: Path, start: Place, encoding: str) -> Iterator[Entry]:
    """The documents of a text file are separated by blank lines."""
    place, document, size = replace(start, line=start.line or 1), [], 0
    for line, at, _, text in lines(file, start.line or 1, start.at, encoding, stop_at_cr=True):
        if text is None or text.strip():
            if not size:
                place = Place(file, place.row, line, at=at)
            size += text_lines.MAX_ROW_BYTES + 1 if text is None else len(text)
            if text is not None and size <= text_lines.MAX_ROW_BYTES:
                document.append(text.rstrip(b"\r\n").decode(errors="surrogateescape"))
        elif size:
            yield place, _text_row(place, document, size, encoding)
            place, document, size = Place(file, place.row + 1), [], 0
    if size:
        yield place, _text_row(place, document, size, encoding)


def _text_row(place: Place, document: list[str], size: int, encoding: str) -> Any:
    if size > text_lines.MAX_ROW_BYTES:
        return too_long_problem(place)
    text = "\n".join(document)
    if (file_encoding := encoding_of(place.file, encoding)).damaged and holds_undecodable(text):
        return undecodable_problem(place, file_encoding.label)
    return problem("row-zero", place=str(place)) if "\0" in text else {"text": text}


READERS: dict[str, Callable[[Path, Place, str], Iterator[Entry]]] = {
    ".json": json_files.read,
    ".jsonl": json_files.read,
    ".csv": csv_files.read,
    ".tsv": csv_files.read,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
