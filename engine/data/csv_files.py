"""A text table (csv, tsv) → its rows. The separator of the cells is detected and proved on the first rows.

A first line `sep=;`, as Excel accepts it, decides; otherwise the separator with which header and rows have the same
number of cells. A row with a different number of cells than the header is reported with its line, wherever it is.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from engine.core.problems import Problem, problem
from engine.data import text_lines
from engine.data.encodings import encoding_of, has_zeros, version
from engine.data.text_lines import Entry, Place, lines, too_long_problem, undecodable_problem

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
SEPARATOR_ROWS_SAMPLED = 100  # rows on which the separator is proved
BYTES_SAMPLED = 1 << 20
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?;*\s*', re.IGNORECASE)
NUMBER = re.compile(r"[-+]?[\d.,]+%?")
SENTENCE_END = re.compile(r"[.?!。？！]$")
MAX_COLUMN_NAME_LENGTH = 60  # characters; a column with a longer name is most likely text


@dataclass(frozen=True)
class Dialect:
    """The format of a table: the separator, whether its first line sets it, the names of its columns, and what could
    not be proved."""

    separator: str
    declared: bool
    names: tuple[str, ...]
    doubts: tuple[Problem, ...] = ()
    problem: Problem | None = None

    @property
    def label(self) -> str:
        return SEPARATORS.get(self.separator, repr(self.separator))


def dialect(file: Path, encoding: str = "") -> Dialect:
    """The format of a table; cached until the file changes. Raises Refusal if it cannot be decoded."""
    return _dialect(file, encoding, *version(file))


@lru_cache(maxsize=1024)
def _dialect(file: Path, encoding: str, mtime_ns: int, size: int) -> Dialect:
    first_lines: list[str] = []
    held = 0
    for _, _, _, text in lines(file, 1, 0, encoding, stop_at_cr=True):
        if text is None or held > BYTES_SAMPLED or len(first_lines) > 4 * SEPARATOR_ROWS_SAMPLED:
            break
        first_lines.append(_decode_lossless(text))
        held += len(text)
    declared = SEPARATOR_LINE.fullmatch(first_lines[0].lstrip("\ufeff")) if first_lines else None
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    doubts: list[Problem] = []
    if declared:
        separator, first_lines = declared[1], first_lines[1:]
    else:
        separator, doubt = _detect_separator(first_lines, usual)
        if doubt:
            doubts.append(problem("table-separator-unsure", file=file.name, **doubt))
    header = next(iter(_rows(first_lines, separator)), [])
    names = _column_names(header)
    if "\0" not in "".join(names):
        doubts += _header_warnings(file, names)
    twice = ", ".join(name for name, count in Counter(names).items() if count > 1)
    duplicates = problem("file-columns-twice", file=file.name, names=twice) if twice else None
    return Dialect(separator, bool(declared), names, tuple(doubts), duplicates)


def _decode_lossless(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _rows(first_lines: list[str], separator: str) -> Iterator[list[str]]:
    """The rows of the first lines, without blank ones, up to what no table can contain."""
    csv.field_size_limit(text_lines.MAX_ROW_BYTES)
    reader = csv.reader(first_lines, delimiter=separator)
    try:
        yield from islice((row for row in reader if row), SEPARATOR_ROWS_SAMPLED)
    except csv.Error:
        return


def _detect_separator(first_lines: list[str], usual: str) -> tuple[str, dict[str, object] | None]:
    """The separator of the cells, and what to report if the rows do not prove it."""
    candidates = [usual, *(separator for separator in SEPARATORS if separator != usual)]
    fits: dict[str, tuple[float, int]] = {}
    for separator in candidates:
        counts = [len(row) for row in _rows(first_lines, separator)]
        if counts and counts[0] > 1:
            fits[separator] = counts.count(counts[0]) / len(counts), counts[0]
    if not fits:
        return usual, None
    best = max(fits, key=lambda separator: (fits[separator][0], separator == usual, fits[separator][1]))
    proved = [separator for separator, (share, _) in fits.items() if share == 1]
    if proved == [best]:
        return best, None
    # If there is only one separator and its rows are ragged, each of them is reported: nothing else is possible.
    if len(fits) == 1 and fits[best][0] >= 0.5:
        return best, None
    share, columns = fits[best]
    others = ", ".join(SEPARATORS[separator] for separator in fits if separator != best)
    return best, {
        "separator": SEPARATORS[best],
        "share": f"{share:.0%}",
        "columns": columns,
        "others": others or "—",
    }


def _column_names(header: list[str]) -> tuple[str, ...]:
    """The names of the columns. A column without a name is called by its number; empty ones at the end are dropped."""
    names = [name.strip().lstrip("\ufeff").strip() for name in header]
    while len(names) > 1 and not names[-1]:
        names.pop()
    return tuple(name or f"column {number}" for number, name in enumerate(names, start=1))


def _header_warnings(file: Path, names: tuple[str, ...]) -> list[Problem]:
    data = [
        name
        for name in names
        if len(name) > MAX_COLUMN_NAME_LENGTH or NUMBER.fullmatch(name) or SENTENCE_END.search(name)
    ]
    if not data or (len(data) * 2 < len(names) and not any(len(name) > MAX_COLUMN_NAME_LENGTH for name in data)):
        return []
    shown = data[0] if len(data[0]) <= MAX_COLUMN_NAME_LENGTH else f"{data[0][:MAX_COLUMN_NAME_LENGTH]}…"
    return [problem("table-header-data", file=file.name, name=shown)]


# ---------------------------------------------------------------------------------------------- reading


def read(file: Path, start: Place, encoding: str = "") -> Iterator[Entry]:
    """The rows from `start` on. Raises Refusal if the file cannot be decoded."""
    table_dialect = dialect(file, encoding)
    if table_dialect.problem:
        yield start, table_dialect.problem
        return
    source = _LineSource(file, start, encoding)
    reader = csv.reader(source, delimiter=table_dialect.separator)
    row = start.row
    if start.at == 0:
        if table_dialect.declared:
            next(source, None)
        try:
            while (header := next(reader, None)) is not None and not header:
                pass
            if header is None:
                return
        except csv.Error as error:
            place = Place(file, row, source.line, at=source.at)
            yield place, problem("file-broken-table", place=str(place), reason=str(error))
            return
        if source.ended or source.too_long or source.undecodable or source.has_zero:
            yield start, _header_problem(start, source)
            return
    names, width = table_dialect.names, len(table_dialect.names)
    while True:
        place = Place(file, row, source.line, at=source.at)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, problem("file-broken-table", place=str(place), reason=str(error))
            return
        if cells is None:
            return
        if len(cells) == width and not source.has_problem:
            yield place, dict(zip(names, cells, strict=True))
        elif not cells and not source.too_long:
            continue
        else:
            yield place, _row_or_problem(place, cells, names, source)
        row += 1


def _header_problem(start: Place, source: _LineSource) -> Problem:
    """The problem with a header."""
    place = Place(start.file, start.row, 1)
    if source.ended:
        return problem("row-quote-open", place=str(place))
    if source.too_long:
        return too_long_problem(place)
    return undecodable_problem(place, source.label) if source.undecodable else problem("row-zero", place=str(place))


def _row_or_problem(place: Place, cells: list[str], names: tuple[str, ...], source: _LineSource) -> object:
    """The cells of a row by the names of their columns, or the Problem with them."""
    ended, long, undecoded, zero = source.ended, source.too_long, source.undecodable, source.has_zero
    source.forget()
    if ended:  # the reader requested another line before the end of the row
        return problem("row-quote-open", place=str(place))
    if long:
        return too_long_problem(place)
    if undecoded:
        return undecodable_problem(place, source.label)
    if len(cells) > len(names) and not any(cells[len(names) :]):
        del cells[len(names) :]  # empty cells of columns without a name
    if len(cells) != len(names):
        return problem("row-cells", place=str(place), expected=len(names), found=len(cells))
    return problem("row-zero", place=str(place)) if zero else dict(zip(names, cells, strict=True))


class _LineSource:
    """The lines of a table for the csv reader, which takes as many as a row needs; and where the next one begins.

    `has_problem`: since the last `forget`, the lines have ended, or one was too long, undecodable or contained a NUL.
    """

    def __init__(self, file: Path, start: Place, encoding: str):
        self.line, self.at = start.line or 1, start.at
        self.label, self.zeros = encoding_of(file, encoding).label, has_zeros(file)
        self.walk = lines(file, self.line, self.at, encoding, stop_at_cr=True)
        self.forget()

    def forget(self) -> None:
        self.has_problem = self.ended = self.too_long = self.undecodable = self.has_zero = False

    def __iter__(self) -> _LineSource:
        return self

    def __next__(self) -> str:
        try:
            line, _, self.at, text = next(self.walk)
        except StopIteration:
            self.has_problem = self.ended = True
            raise
        self.line = line + 1
        if text is None:
            self.has_problem = self.too_long = True
            return "\n"
        if self.zeros and b"\0" in text:
            self.has_problem = self.has_zero = True
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.has_problem = self.undecodable = True
            return _decode_lossless(text)
