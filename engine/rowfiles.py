"""A data file → its rows, one after the other, from any place in it.

json, jsonl, csv, tsv, parquet and txt; UTF-8, UTF-16 and GB18030. Nothing is held but the row at hand, and of that no
more than LONGEST bytes: a file of any size, and a line of any length, fit into memory. What cannot be read as a row
comes as a Problem in its place. What a row means is left to `engine.datasets`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from engine.problems import Problem, Refusal, problem

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
LONGEST = 64 << 20  # bytes of one row, as UTF-8
BUFFER = 1 << 20  # bytes read at a time
EVERY = 256  # rows from one remembered place to the next

SPACE = re.compile(r"[ \t\r\n]*")
decode_next = json.JSONDecoder().raw_decode


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


Row = dict[str, Any]
Entry = tuple[Place, Any]  # what stands where a row should: a row, one hopes, or the Problem in its place
OnBad = Callable[[Problem], None]


def entries(file: Path, start: Place | None = None) -> Iterator[Entry]:
    """The rows of a file, each with its place, from `start` on if one is given: a place that this has told before.

    Where a row cannot be read there is a Problem instead; the last entry may be a Problem of the file itself.
    """
    start = start or Place(file, 1)
    try:
        for place, row in READERS[file.suffix.lower()](file, start):
            yield place, row if isinstance(row, (dict, Problem)) else no_row(place, row)
    except Refusal as refusal:
        yield start, refusal.problems[0]
    except UnicodeDecodeError:  # UTF-16 is believed to be what its mark says, and read only now
        yield start, problem("file-encoding", file=file.name, line=start.line or 1)


def objects(found: Iterable[Entry], on_bad: OnBad) -> Iterator[tuple[Place, Row]]:
    """Those that are rows; the others go to `on_bad`."""
    for place, row in found:
        if isinstance(row, dict):
            yield place, row
        else:
            on_bad(row if isinstance(row, Problem) else no_row(place, row))


def no_row(place: Place, value: Any) -> Problem:
    """What to say of something that is no object."""
    return problem("row-type", place=str(place), expected="object", found=type_of(value))


def places(file: Path) -> tuple[list[Place], int]:
    """The place of every EVERY-th row, the first one's before all, and how many rows there are, good or bad.

    Takes one reading of the file, and is remembered until it changes.
    """
    return _places(file, *version(file))


def count(file: Path) -> int:
    """How many rows there are, good or bad; remembered until the file changes. Raises Refusal if it is no data."""
    return _count(file, *version(file))


def broken_off(file: Path) -> Problem | None:
    """Says so where a JSON file ends in the middle of a row, and how many rows before it can be read. Reads all of it."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return None
    rows, before, last, value = 0, None, None, None
    for place, value in entries(file):
        before, last, rows = last, place, rows + isinstance(value, dict)
    codes = ("row-not-json", "file-broken-json")
    if not rows or not isinstance(value, Problem) or value.code not in codes:
        return None  # whole; or no row can be read at all, which whoever looks at its columns says
    # What is broken is only known from where a row begins: in an array, that is the one before.
    opening, start = (b"", last) if by_lines(file) else (b"[", before)
    with open_utf8(file, start.at) as stream:
        rest = opening + stream.read(2 * LONGEST)
    try:
        from_json(rest)
    except ValueError as error:
        if str(error).startswith("EOF while parsing"):
            return problem("file-breaks-off", file=file.name, line=last.line, rows=rows)
    return None


def version(file: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _places(file: Path, mtime_ns: int, size: int) -> tuple[list[Place], int]:
    found, number = [], 0
    if by_lines(file):
        for number, line, at, _ in _full_lines(file, 1, 1, 0):
            if number % EVERY == 1:
                found.append(Place(file, number, line, at=at))
    else:
        for number, (place, _) in enumerate(entries(file), start=1):
            if number % EVERY == 1:
                found.append(place)
    return found, number


@lru_cache(maxsize=1024)
def _count(file: Path, mtime_ns: int, size: int) -> int:
    if file.suffix.lower() == ".parquet":
        return _parquet_file(file).metadata.num_rows
    encoding_of(file)
    return _places(file, mtime_ns, size)[1]


def by_lines(file: Path) -> bool:
    """Whether every line is a row of JSON: files are often named .json for .jsonl and the other way about."""
    return file.suffix.lower() in (".json", ".jsonl") and _first_character(file) != b"["


# ------------------------------------------------------------------------------------------ encodings


def encoding_of(file: Path) -> str:
    """The text encoding of a file: by its byte order mark, else UTF-8 if all of it is, else GB18030 if all of it is.

    Raises Refusal if it is neither.
    """
    return _encoding(file, *version(file))


@lru_cache(maxsize=1024)
def _encoding(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as stream:
        start = stream.read(4096)
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return encoding
    # Without a mark, UTF-16 shows in the zero bytes of its Latin letters, digits and brackets: every second byte.
    zeros = start[::2].count(0), start[1::2].count(0)
    if max(zeros) * 8 > len(start) and min(zeros) * 4 < max(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    for encoding in ("utf-8", "gb18030"):
        decoder = codecs.getincrementaldecoder(encoding)()
        lines = 1
        with file.open("rb") as stream:
            try:
                while block := stream.read(BUFFER):
                    decoder.decode(block)
                    lines += block.count(b"\n")
                decoder.decode(b"", final=True)
                return encoding
            except UnicodeDecodeError as error:
                if encoding == "utf-8":
                    line = lines + error.object[: error.start].count(b"\n")
    raise Refusal(problem("file-encoding", file=file.name, line=line))


class _Recoded(io.RawIOBase):
    """The bytes that a file would have if it were UTF-8."""

    def __init__(self, file: Path, encoding: str):
        self.source, self.ready = file.open("rb"), memoryview(b"")
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.ready:
            block = self.source.read(BUFFER)
            self.ready = memoryview(self.decoder.decode(block, final=not block).encode())
            if not block:
                break
        size = min(len(into), len(self.ready))
        into[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.source.close()
        super().close()


def open_utf8(file: Path, at: int = 0) -> BinaryIO:
    """The text of a file as UTF-8 without a byte order mark, whatever it is written in, from byte `at` on.

    Raises Refusal if its encoding is not known. `at` counts from the start of the file, a mark included.
    """
    encoding = encoding_of(file)
    if encoding.startswith("utf-8"):
        stream: BinaryIO = file.open("rb")
        stream.seek(at or len(codecs.BOM_UTF8) * (encoding == "utf-8-sig"))
        return stream
    stream = io.BufferedReader(_Recoded(file, encoding), BUFFER)
    while at > 0:  # what was written in another encoding can only be reached by reading up to there
        at -= len(stream.read(min(at, BUFFER)) or b" " * at)
    return stream


def read_text(file: Path) -> str:
    """All of a small file. Raises Refusal if its encoding is not known."""
    with open_utf8(file) as stream:
        return stream.read().decode()


def _first_character(file: Path) -> bytes:
    with open_utf8(file) as stream:
        while block := stream.read(4096):
            if block := block.lstrip():
                return block[:1]
    return b""


# ---------------------------------------------------------------------------------------------- lines


def _lines(file: Path, line: int, at: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Number, beginning, end and text of every line; None for the text of one that is too long to be held."""
    with open_utf8(file, at) as stream:
        at = at or (stream.tell() if stream.seekable() else 0)
        while text := stream.readline(LONGEST):
            size, whole = len(text), len(text) < LONGEST or text.endswith(b"\n")
            while not whole:
                more = stream.readline(BUFFER)
                size, whole = size + len(more), len(more) < BUFFER or more.endswith(b"\n")
            yield line, at, at + size, text if size <= LONGEST else None
            line, at = line + 1, at + size


def _full_lines(file: Path, row: int, line: int, at: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """The lines that are not blank, with the number of the row that each is."""
    for number, begins, _, text in _lines(file, line, at):
        if text is None or not text.isspace():
            yield row, number, begins, text
            row += 1


def _too_long(place: Place) -> Problem:
    return problem("row-too-long", place=str(place), limit=f"{LONGEST >> 20} MB")


def _json(file: Path, start: Place) -> Iterator[Entry]:
    return (_json_lines if by_lines(file) else _json_array)(file, start)


def _json_lines(file: Path, start: Place) -> Iterator[Entry]:
    for row, line, at, text in _full_lines(file, start.row, start.line or 1, start.at):
        place = Place(file, row, line, at=at)
        if text is None:
            yield place, _too_long(place)
            continue
        yield place, of_line(place, text)


def of_line(place: Place, line: bytes) -> Any:
    """What a line of JSON holds, or the Problem with it."""
    try:
        return from_json(line, cache_strings="keys")
    except ValueError:  # the other parser is kinder, and says better what is wrong
        pass
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return problem("row-not-json", place=str(place), column=error.colno, reason=error.msg)
    except RecursionError:
        return problem("row-not-json", place=str(place), column=1, reason="nested too deeply")
    return _without_halves(place, value, line)


def _without_halves(place: Place, value: Any, written: str | bytes) -> Any:
    """The value, or the Problem if its text holds half of a character."""
    found = half_character(value, written)
    return problem("row-half-character", place=str(place), found=found) if found else value


def half_character(value: Any, written: str | bytes) -> str | None:
    """The first half of a character in a value, as JSON has it: "\\ud83d" alone, which nothing can be trained on.
    `written` is the JSON that the value was."""
    if (b"\\ud" if isinstance(written, bytes) else "\\ud") in written.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return ascii(error.object[error.start]).strip("'")
    return None


def _json_array(file: Path, start: Place) -> Iterator[Entry]:
    # Decoded row by row from a buffer of text. What looks like an error may be a row cut off at the end of the
    # buffer, until the buffer holds more than a row may have, or the file ends.
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_utf8(file, start.at) as stream:

        def more(size: int) -> str:
            block = stream.read(size)
            return decoder.decode(block, final=len(block) < size)

        at_byte = start.at or (stream.tell() if stream.seekable() else 0)
        text, at, counted = more(BUFFER), 0, 0  # counted: up to where the lines and bytes of `text` are known
        row, line, column, first = start.row, start.line or 1, start.column or 1, True
        if not start.at:
            while not (opening := text.lstrip()):
                text += more(BUFFER)
            at = len(text) - len(opening) + 1
        while True:
            ended = at
            try:
                begins, value, at = _next_in_array(text, at, first)
            except (json.JSONDecodeError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                position = at if deep else error.pos
                cut_off = not deep and (error.msg.startswith("Unterminated") or len(text) - position < 16)
                if cut_off and len(text) - at <= LONGEST and (block := more(max(BUFFER, len(text) - at))):
                    passed = text[counted:at]
                    line, column, at_byte = _moved(passed, line, column, at_byte)
                    text, at, counted = text[at:] + block, 0, 0
                    continue
                line, column, at_byte = _moved(text[counted:position], line, column, at_byte)
                place = Place(file, row, line, at=at_byte)
                if len(text) - at > LONGEST:
                    yield place, problem("row-too-long-array", place=str(place), limit=f"{LONGEST >> 20} MB")
                    return
                reason = "nested too deeply" if deep else error.msg
                values = {"file": file.name, "line": line, "column": column, "reason": reason}
                yield place, problem("file-broken-json", **values)
                return
            if begins is None:
                return
            line, column, at_byte = _moved(text[counted:begins], line, column, at_byte)
            newline = text.rfind("\n", ended, begins)
            alone = newline >= 0 and text[newline:begins].isspace()
            if first and start.at:
                alone = start.column is None
            place = Place(file, row, line, None if alone else column, at_byte)
            yield place, _without_halves(place, value, text[begins:at])
            counted, row, first = begins, row + 1, False


def _moved(passed: str, line: int, column: int, at: int) -> tuple[int, int, int]:
    """Line, column and byte behind the text that was passed."""
    lines = passed.count("\n")
    column = len(passed) - passed.rfind("\n") if lines else column + len(passed)
    return line + lines, column, at + (len(passed) if passed.isascii() else len(passed.encode()))


def _next_in_array(text: str, at: int, first: bool) -> tuple[int | None, Any, int]:
    """Where the next element begins, the element, and where it ends; None for all at the end of the array.

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


# ------------------------------------------------------------------------------------------ other files


def _table(file: Path, start: Place) -> Iterator[Entry]:
    csv.field_size_limit(LONGEST)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    header = _header(file, delimiter)
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        yield start, problem("file-columns-twice", file=file.name, names=", ".join(twice))
        return
    read = _Lines(file, start)
    reader = csv.reader(read, delimiter=delimiter)
    row = start.row
    if start.at == 0:
        next(reader, None)
    while True:
        place = Place(file, row, read.line, at=read.at)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, problem("file-broken-table", place=str(place), reason=str(error))
            return
        if cells is None:
            return
        if not cells and not read.too_long:
            continue
        if read.ended:  # the reader asked for another line before the row was over
            yield place, problem("row-quote-open", place=str(place))
        elif read.too_long:
            read.too_long = False
            yield place, _too_long(place)
        elif len(cells) != len(header):
            yield place, problem("row-cells", place=str(place), expected=len(header), found=len(cells))
        else:
            yield place, dict(zip(header, cells, strict=True))
        row += 1


def _header(file: Path, delimiter: str) -> list[str]:
    return next(csv.reader(_Lines(file, Place(file, 1)), delimiter=delimiter), [])


class _Lines:
    """The lines of a table for the csv reader, which takes as many as a row needs; and where the next one begins."""

    def __init__(self, file: Path, start: Place):
        self.line, self.at, self.ended, self.too_long = start.line or 1, start.at, False, False
        self.walk = _lines(file, self.line, self.at)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line, _, self.at, text = next(self.walk)
        except StopIteration:
            self.ended = True
            raise
        self.line = line + 1
        if text is None:
            self.too_long = True
            return "\n"
        return text.decode()


def _parquet_file(file: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise Refusal(problem("file-broken-parquet", file=file.name, reason=str(error))) from error


def _parquet(file: Path, start: Place) -> Iterator[Entry]:
    from pyarrow import ArrowException

    table, row = _parquet_file(file), 1
    try:
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size <= start.row:
                row += size
                continue
            for batch in table.iter_batches(batch_size=EVERY, row_groups=[group]):
                if row + batch.num_rows > start.row:
                    for number, value in enumerate(batch.to_pylist(), start=row):
                        if number >= start.row:
                            yield Place(file, number), value
                row += batch.num_rows
    except (ArrowException, OSError) as error:
        yield Place(file, row), problem("file-broken-parquet", file=file.name, reason=str(error))


def _paragraphs(file: Path, start: Place) -> Iterator[Entry]:
    """A text file's documents are separated by blank lines."""
    place, document, size = replace(start, line=start.line or 1), [], 0
    for line, at, _, text in _lines(file, start.line or 1, start.at):
        if text is None or text.strip():
            if not size:
                place = Place(file, place.row, line, at=at)
            size += LONGEST + 1 if text is None else len(text)
            if size <= LONGEST:
                document.append(text.decode().rstrip("\r\n"))
        elif size:
            yield place, _document(place, document, size)
            place, document, size = Place(file, place.row + 1), [], 0
    if size:
        yield place, _document(place, document, size)


def _document(place: Place, lines: list[str], size: int) -> Any:
    return _too_long(place) if size > LONGEST else {"text": "\n".join(lines)}


READERS: dict[str, Callable[[Path, Place], Iterator[Entry]]] = {
    ".json": _json, ".jsonl": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _paragraphs,
}  # fmt: skip


def type_of(value: Any) -> str:
    """The word JSON has for it."""
    words = {str: "string", bool: "true/false", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)
