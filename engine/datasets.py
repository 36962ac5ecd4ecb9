"""Finds, reads and validates data sets, and says exactly what is wrong with them and where.

A catalogue is a folder with a `dataset_info.json`, as LLaMA-Factory's users have it. Whatever its files look like
(alpaca, sharegpt, openai; json, jsonl, csv, tsv, parquet, txt), `examples` yields one canonical form:

    text    {"text": str}
    chat    {"messages": [{"role", "content", "tool_calls"?, "reasoning_content"?}, ...], "tools": [...] | None}
    pairs   {"messages": prompt, "chosen": [message], "rejected": [message], "tools": ...}
    thumbs  {"messages": prompt and answer, "label": bool, "tools": ...}
    prompts {"messages": prompt, "answer": str | None, "tools": ...}; any of the three above, read for its questions

A row that does not fit is a Problem with file and line, and the others go on. Tokens are left to `engine.worker`.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from engine.problems import Problem, Refusal, problem
from engine.stages import FITS, Form, Kind

INFO_FILE = "dataset_info.json"
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")

Example = dict[str, Any]
OnBad = Callable[[Problem], None]

# LLaMA-Factory's defaults, which users' files rely on. Where an entry gives columns, those it leaves out do not exist.
COLUMNS = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
        "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
    "openai": {"messages": "messages", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
}  # fmt: skip
TAGS = {
    "sharegpt": {
        "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
    },
    "openai": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
    },
}  # fmt: skip
MAY_FOLLOW = {  # who may speak after whom; "call" is an assistant's call of tools
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",),
    "call": ("tool",), "tool": ("tool", "assistant"),
}  # fmt: skip
SPLITS = {  # what the names of files call them
    "train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
BUFFER = 1 << 20  # characters of a JSON array held at a time
RECOMMENDED_AFTER = 100  # rows, of which one at least is good
SPACE = re.compile(r"[ \t\r\n]*")
HALF, HALF_READ = re.compile(r"\\u[dD][89a-fA-F]\w\w"), re.compile("[\ud800-\udfff]")
PLACEHOLDER = re.compile(r"\{\{\s*[\w.-]+\s*\}\}")


@dataclass(frozen=True)
class Dataset:
    """One entry of a catalogue. `problem` says why it cannot be used; `hub` is the id of one that is not on disk."""

    name: str
    kind: Kind = "chat"
    formatting: str = "alpaca"
    files: tuple[Path, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    hub: str = ""
    subset: str = ""
    split: str = "train"
    problem: Problem | None = None


@dataclass(frozen=True)
class Place:
    """Where a row is: its number from 1 in its file, and its line from 1 where the file has lines.

    `column`, from 1, is where it begins in that line, if it is not the first thing there: an array of rows may be
    written in one line.
    """

    file: Path
    row: int
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        if self.column:
            return f"{self.file.name}:{self.line}:{self.column} (#{self.row})"
        return f"{self.file.name}:{self.line}" if self.line else f"{self.file.name}#{self.row}"


@dataclass(frozen=True)
class Report:
    """What `check` found: rows that can be used and not, and the first of the problems and warnings."""

    good: int
    bad: int
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def usable(self) -> bool:
        return self.good > 0


# ------------------------------------------------------------------------------------------ catalogue


def read_catalogue(data_dir: Path) -> tuple[list[Dataset], list[Problem]]:
    """The data sets of a folder, in the order of its file, and what is wrong with the file as a whole.

    An entry that cannot be used stays in the list with its `problem`. Never raises on what users may have written.
    """
    path = data_dir / INFO_FILE
    if not path.is_file():
        return [], [problem("catalogue-missing", file=str(path))]
    try:
        entries = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        values = {"line": error.lineno, "column": error.colno, "reason": error.msg}
        return [], [problem("catalogue-broken", file=str(path), **values)]
    except Refusal as refusal:
        return [], refusal.problems
    if not isinstance(entries, dict):
        return [], [problem("catalogue-not-object", file=str(path), found=_type(entries))]
    return [_dataset(data_dir, name, entry) for name, entry in entries.items()], []


def _dataset(data_dir: Path, name: str, entry: Any) -> Dataset:
    try:
        return _read_entry(data_dir, name, entry)
    except Refusal as refusal:
        return Dataset(name, problem=refusal.problems[0])
    except (OSError, ValueError) as error:  # a name too long for a file, or with a NUL in it
        values = {"key": "file_name", "expected": "file name", "found": error}
        return Dataset(name, problem=problem("entry-value", name=name, **values))


def _read_entry(data_dir: Path, name: str, entry: Any) -> Dataset:
    _expect(entry, dict, "entry-value", name=name, key="", expected="object")
    shapes: dict[str, tuple[type, str]] = {
        "file_name": (str, "string"), "formatting": (str, "string"), "columns": (dict, "object"),
        "tags": (dict, "object"), "num_samples": (int, "number"), "ranking": (bool, "true/false"),
    }  # fmt: skip
    for key, (shape, expected) in shapes.items():
        if entry.get(key) is not None:
            _expect(entry[key], shape, "entry-value", name=name, key=key, expected=expected)
    if entry.get("num_samples") is not None and entry["num_samples"] < 1:
        raise Refusal(
            problem("entry-value", name=name, key="num_samples", expected="≥ 1", found=entry["num_samples"])
        )
    hub = next((entry[key] for key in ("hf_hub_url", "ms_hub_url", "om_hub_url") if entry.get(key)), "")
    if not entry.get("file_name") and not hub:
        raise Refusal(problem("entry-without-file", name=name, keys=_names(entry)))
    files = ()
    if entry.get("file_name"):
        subset, split = (str(entry.get(key) or "") for key in ("subset", "split"))
        files = _of_split(name, _files(data_dir, name, entry["file_name"], subset), split)
    # An entry that says nothing about its rows is believed to be what its first row looks like.
    entry = (guess(files[0]) if files and not {"formatting", "columns"} & set(entry) else {}) | entry
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in COLUMNS:
        raise Refusal(problem("entry-formatting", name=name, found=formatting, known=_names(COLUMNS)))
    given = {key: column for key, column in (entry.get("columns") or {}).items() if isinstance(column, str)}
    columns = given or COLUMNS[formatting]
    if formatting != "alpaca":
        columns = {"messages": COLUMNS[formatting]["messages"], **columns}
    return Dataset(
        name=name,
        kind=_kind(entry, formatting, columns, files),
        formatting=formatting,
        files=files,
        columns=columns,
        tags=TAGS.get(formatting, {}) | (entry.get("tags") or {}),
        num_samples=entry.get("num_samples"),
        hub="" if files else str(hub),
        subset=str(entry.get("subset") or ""),
        split=str(entry.get("split") or "train"),
    )


def _kind(
    entry: Mapping[str, Any], formatting: str, columns: Mapping[str, str], files: Sequence[Path]
) -> Kind:
    if entry.get("ranking"):
        return "pairs"
    if "kto_tag" in columns:
        return "thumbs"
    if formatting == "alpaca" and ("response" not in columns or any(file.suffix == ".txt" for file in files)):
        return "text"
    return "chat"


def _files(data_dir: Path, name: str, file_name: str, subset: str) -> tuple[Path, ...]:
    """A file, or those of a folder; of the folder in it that is called `subset`, if one is wanted.

    Raises Refusal if nothing is there, or if it is outside of the data folder once links are followed.
    """
    root, path = data_dir.resolve(), data_dir / file_name / subset
    if not path.resolve().is_relative_to(root):
        raise Refusal(problem("file-outside", name=name, file=file_name, folder=str(data_dir)))
    if not path.exists():
        raise Refusal(problem("file-missing", name=name, file=str(path)))
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = tuple(file for file in found if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise Refusal(problem("file-format", name=name, file=str(path), known=_names(SUFFIXES)))
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise Refusal(problem("file-outside", name=name, file=file.name, folder=str(data_dir)))
    return files


def _of_split(name: str, files: tuple[Path, ...], split: str) -> tuple[Path, ...]:
    """Those of `split`, told by their names as the datasets library does it: test-00000-of-00002.parquet, my_test.json.

    Where none is wanted they are the ones for training, or all if no name says so. Raises Refusal for a wanted split
    that no file has.
    """
    wanted = split or "train"
    words = "|".join(map(re.escape, SPLITS.get(wanted, (wanted,))))
    named = re.compile(
        rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE
    )  # no letter before or after it
    found = tuple(file for file in files if named.search(file.stem))
    if split and split != "train" and not found:
        raise Refusal(problem("split-missing", name=name, split=split, files=_names(f.name for f in files)))
    return found or files


def guess(file: Path) -> dict[str, Any]:
    """What to write into dataset_info.json for a file, going by its first row. {} where that tells nothing."""
    row = next((row for _, row in _rows_of(file, lambda _: None)), {})
    for formatting, role_tag in (("sharegpt", "from"), ("openai", "role")):
        for column in ("messages", "conversations"):
            turns = _parsed(row.get(column))
            if isinstance(turns, list) and turns and isinstance(turns[0], dict) and role_tag in turns[0]:
                optional = {key: key for key in ("system", "tools") if key in row}
                return {"formatting": formatting, "columns": {"messages": column, **optional}}
    if "text" in row and not {"instruction", "output"} & set(row):
        return {"columns": {"prompt": "text"}}
    return {}


# ---------------------------------------------------------------------------------------------- files


def rows(dataset: Dataset, on_bad: OnBad) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows as they are in the files, lazily, `num_samples` at most; what is no row goes to `on_bad`.

    Raises Refusal if the data set itself cannot be used.
    """
    found = (place_and_row for file in files_of(dataset) for place_and_row in _rows_of(file, on_bad))
    return islice(found, dataset.num_samples)


def files_of(dataset: Dataset) -> tuple[Path, ...]:
    """Its files. Raises Refusal if the data set itself cannot be used."""
    if dataset.problem:
        raise Refusal(dataset.problem)
    if not dataset.files:
        raise Refusal(problem("dataset-on-hub", name=dataset.name, hub=dataset.hub))
    return dataset.files


def count_rows(dataset: Dataset) -> int:
    """How many rows there are, good or bad. Fast, and remembered until a file changes. Raises Refusal as `rows`."""
    total = sum(_count(file, *_version(file)) for file in files_of(dataset))
    return total if dataset.num_samples is None else min(total, dataset.num_samples)


def encoding_of(file: Path) -> str:
    """The text encoding of a file: by its byte order mark, else UTF-8 if all of it is, else GB18030 if all of it is.

    Raises Refusal if it is neither.
    """
    return _encoding(file, *_version(file))


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1024)
def _count(file: Path, mtime_ns: int, size: int) -> int:
    if file.suffix.lower() == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return parquet.ParquetFile(file).metadata.num_rows
        except (ArrowException, OSError) as error:
            raise Refusal(problem("file-broken-parquet", file=file.name, reason=str(error))) from error
    if file.suffix.lower() in (".json", ".jsonl") and _first_character(file) != "[":
        with _open(file) as stream:
            return sum(1 for line in stream if not line.isspace())
    bad: list[Problem] = []
    return sum(1 for _ in _rows_of(file, bad.append)) + len(bad)


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
    if max(zeros) * 8 > len(start):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    for encoding in ("utf-8", "gb18030"):
        decoder = codecs.getincrementaldecoder(encoding)()
        lines = 1
        with file.open("rb") as stream:
            try:
                while block := stream.read(1 << 20):
                    decoder.decode(block)
                    lines += block.count(b"\n")
                decoder.decode(b"", final=True)
                return encoding
            except UnicodeDecodeError as error:
                if encoding == "utf-8":
                    line = lines + error.object[: error.start].count(b"\n")
    raise Refusal(problem("file-encoding", file=file.name, line=line))


def _open(file: Path) -> TextIO:
    return file.open(encoding=encoding_of(file), newline="")


def _read_text(file: Path) -> str:
    with _open(file) as stream:
        return stream.read()


def _rows_of(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, dict[str, Any]]]:
    return objects(entries(file, on_bad), on_bad)


def entries(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    """Whatever stands in a file where a row should, one after the other."""
    try:
        yield from READERS[file.suffix.lower()](file, on_bad)
    except Refusal as refusal:
        for each in refusal.problems:
            on_bad(each)


def objects(found: Iterable[tuple[Place, Any]], on_bad: OnBad) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Those that are rows; the others go to `on_bad`."""
    for place, row in found:
        if isinstance(row, dict):
            yield place, row
        else:
            on_bad(problem("row-type", place=str(place), expected="object", found=_type(row)))


def _json(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    """An array of rows, or one row per line: files are often named .json for .jsonl and the other way about."""
    return (_json_array if _first_character(file) == "[" else _json_lines)(file, on_bad)


def _first_character(file: Path) -> str:
    with _open(file) as stream:
        while block := stream.read(4096):
            if block := block.lstrip():
                return block[0]
    return ""


def _json_array(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    # Decoded row by row from a buffer of whole lines, so that rows and errors have a line, and a file of any size
    # fits into memory. What looks like an error may be a row cut off at the end of the buffer, until the file ends.
    with _open(file) as stream:
        text, first_line = stream.read(BUFFER), 1
        at, row, line, counted, line_at = text.index("[") + 1, 0, 1, 0, 0
        while True:
            before = at
            try:
                start, value, at = _next_in_array(text, at, first=row == 0)
            except json.JSONDecodeError as error:
                if more := stream.read(max(BUFFER, len(text))):
                    cut = text.rfind("\n", 0, at) + 1
                    first_line += text.count("\n", 0, cut)
                    text, at, counted, line, line_at = text[cut:] + more, at - cut, 0, first_line, 0
                    continue
                line = first_line + error.lineno - 1
                on_bad(
                    problem(
                        "file-broken-json", file=file.name, line=line, column=error.colno, reason=error.msg
                    )
                )
                return
            if start is None:
                return
            line_at = max(line_at, text.rfind("\n", counted, start) + 1)
            row, line, counted = row + 1, line + text.count("\n", counted, start), start
            newline = text.rfind("\n", before, start)
            first_there = newline >= 0 and text[newline:start].isspace()
            place = Place(file, row, line, None if first_there else start - line_at + 1)
            if whole(place, value, text[start:at], on_bad):
                yield place, value


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
    value, end = json.JSONDecoder().raw_decode(text, at)
    return at, value, end


def _json_lines(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    with _open(file) as stream:
        row = 0
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            row += 1
            place = Place(file, row, number)
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                on_bad(problem("row-not-json", place=str(place), column=error.colno, reason=error.msg))
                continue
            if whole(place, value, line, on_bad):
                yield place, value


def whole(place: Place, value: Any, written: str, on_bad: OnBad) -> bool:
    """Whether all of a row is text. JSON can write half of a character beyond the first 65,536, which is none."""
    found = HALF.search(written)
    if found and HALF_READ.search(json.dumps(value, ensure_ascii=False)):
        on_bad(problem("row-half-character", place=str(place), found=found[0]))
        return False
    return True


def _table(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(2**31 - 1)
    with _open(file) as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        header = next(reader, [])
        row, line = 0, reader.line_num + 1
        for cells in reader:
            place, line = Place(file, row + 1, line), reader.line_num + 1
            if not cells:
                continue
            row += 1
            if len(cells) != len(header):
                on_bad(problem("row-cells", place=str(place), expected=len(header), found=len(cells)))
            else:
                yield place, dict(zip(header, cells, strict=True))


def _parquet(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    from pyarrow import ArrowException, parquet

    row = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                row += 1
                yield Place(file, row), value
    except (ArrowException, OSError) as error:
        on_bad(problem("file-broken-parquet", file=file.name, reason=str(error)))


def _paragraphs(file: Path, on_bad: OnBad) -> Iterator[tuple[Place, Any]]:
    """A text file's documents are separated by blank lines."""
    with _open(file) as stream:
        document: list[str] = []
        row, first = 0, 1
        for number, line in enumerate(chain(stream, [""]), start=1):
            if line.strip():
                document.append(line.rstrip("\r\n"))
            elif document:
                row += 1
                yield Place(file, row, first), {"text": "\n".join(document)}
                document = []
            if not document:
                first = number + 1


READERS = {
    ".json": _json, ".jsonl": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _paragraphs,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- rows


def examples(dataset: Dataset, on_bad: OnBad, form: Form | None = None) -> Iterator[Example]:
    """The rows in a canonical form (see the module's docstring), that of their own kind if none is named; each bad
    one goes to `on_bad` and is left out.

    Raises Refusal if the data set itself cannot be used.
    """
    return canonical(dataset, rows(dataset, on_bad), on_bad, form)


def canonical(
    dataset: Dataset,
    found: Iterable[tuple[Place, Mapping[str, Any]]],
    on_bad: OnBad,
    form: Form | None = None,
) -> Iterator[Example]:
    """The same of rows that are read already."""
    convert = CONVERSIONS[form or dataset.kind]
    for place, row in found:
        try:
            yield convert(_Row(dataset, place, row))
        except Refusal as refusal:
            on_bad(refusal.problems[0])


def check(
    dataset: Dataset, form: Form, limit: int | None = None, catalogue: Sequence[Dataset] = (), most: int = 20
) -> Report:
    """Reads up to `limit` rows and reports which can be used for a stage that needs `form`.

    At most `most` problems and warnings are kept; `bad` counts them all. `catalogue` is where other data sets are
    recommended from, if this one is of the wrong kind.
    """
    if dataset.problem is None and dataset.kind not in FITS[form]:
        fitting = _names(recommended(catalogue, form))
        return Report(0, 0, (problem(f"kind-{form}-wanted", name=dataset.name, fitting=fitting),))
    good = bad = 0
    problems: list[Problem] = []
    warnings: list[Problem] = []

    def on_bad(each: Problem) -> None:
        nonlocal bad
        bad += 1
        if len(problems) < most:
            problems.append(each)

    convert = CONVERSIONS[form]
    try:
        for place, row in islice(rows(dataset, on_bad), limit):
            try:
                example = convert(_Row(dataset, place, row))
            except Refusal as refusal:
                on_bad(refusal.problems[0])
                continue
            good += 1
            if len(warnings) < most and (found := PLACEHOLDER.search(_written(example))):
                warnings.append(problem("row-placeholder", place=str(place), found=found[0]))
    except Refusal as refusal:
        return Report(0, 0, tuple(refusal.problems))
    if not good and not bad:
        problems.append(problem("dataset-empty", name=dataset.name))
    return Report(good, bad, tuple(problems), tuple(warnings))


def recommended(catalogue: Sequence[Dataset], form: Form) -> list[str]:
    """Names of the data sets that have a row of that form among their first ones."""
    return [
        one.name
        for one in catalogue
        if one.kind in FITS[form] and check(one, form, limit=RECOMMENDED_AFTER).usable
    ]


@dataclass(frozen=True)
class _Row:
    """One row, asked for its values by LLaMA-Factory's names of the columns."""

    dataset: Dataset
    place: Place
    values: Mapping[str, Any]

    def bad(self, code: str, **values: Any) -> Refusal:
        return Refusal(problem(code, place=str(self.place), **values))

    def get(self, key: str) -> Any:
        """The value of an optional column; None where there is none."""
        return self.values.get(self.dataset.columns.get(key, ""))

    def need(self, key: str) -> Any:
        column = self.dataset.columns.get(key, key)
        if column not in self.values:
            raise self.bad("row-without-column", column=column, columns=_names(self.values))
        return self.values[column]

    def string(self, value: Any, column: str) -> str:
        """Raises Refusal unless the value is a string, or a list of text parts as OpenAI writes it."""
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            if other := next((part for part in value if not isinstance(part.get("text"), str)), None):
                raise self.bad("row-not-text", column=column, found=other.get("type") or _names(other))
            return "".join(part["text"] for part in value)
        raise self.bad("row-value-type", column=column, expected="string", found=_type(value))

    def filled(self, value: Any, column: str) -> str:
        text = self.string(value, column)
        if not text.strip():
            raise self.bad("row-empty", column=column)
        return text

    def items(self, value: Any, column: str) -> list[Any]:
        """A list, or the JSON of one: tables can hold nothing else."""
        value = _parsed(value)
        if not isinstance(value, list):
            raise self.bad("row-value-type", column=column, expected="list", found=_type(value))
        return value

    def column(self, key: str) -> str:
        return self.dataset.columns.get(key, key)


def _text(row: _Row) -> Example:
    column = "text" if row.place.file.suffix == ".txt" else row.column("prompt")
    if column not in row.values:
        raise row.bad("row-without-column", column=column, columns=_names(row.values))
    return {"text": row.filled(row.values[column], column)}


def _chat(row: _Row) -> Example:
    messages = _prompt(row)
    if row.dataset.formatting == "alpaca":
        messages.append(_answer(row))
    return {"messages": _in_order(row, messages, "assistant"), "tools": _tools(row)}


def _pairs(row: _Row) -> Example:
    prompt = _in_order(row, _prompt(row), "user", "tool")
    chosen, rejected = ([_choice(row, key)] for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise row.bad("row-pair-equal")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected, "tools": _tools(row)}


def _thumbs(row: _Row) -> Example:
    label = row.need("kto_tag")
    label = {"true": True, "false": False}.get(label.lower(), label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        raise row.bad(
            "row-value-type", column=row.column("kto_tag"), expected="true/false", found=_type(label)
        )
    return {**_chat(row), "label": label}


def _prompts(row: _Row) -> Example:
    """The questions of a row, and its answer where it has one: what follows the last turn of anybody else."""
    messages = _prompt(row)
    answer = row.get("response") if row.dataset.formatting == "alpaca" else None
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    answer = row.string(answer, row.column("response")) if answer else None
    return {"messages": _in_order(row, messages, "user", "tool"), "answer": answer, "tools": _tools(row)}


CONVERSIONS: Mapping[Form, Callable[[_Row], Example]] = {
    "text": _text, "chat": _chat, "pairs": _pairs, "thumbs": _thumbs, "prompts": _prompts,
}  # fmt: skip


def _prompt(row: _Row) -> list[dict[str, Any]]:
    """All messages of a row that are not in a column of their own."""
    system = row.get("system")
    messages = [{"role": "system", "content": row.string(system, row.column("system"))}] if system else []
    if row.dataset.formatting != "alpaca":
        turns = row.items(row.need("messages"), row.column("messages"))
        spoken = [
            _message(row, turn, f"{row.column('messages')}[{number}]") for number, turn in enumerate(turns)
        ]
        return spoken if spoken and spoken[0]["role"] == "system" else messages + spoken
    history = row.get("history")
    for number, exchange in enumerate(row.items(history, row.column("history")) if history else ()):
        column = f"{row.column('history')}[{number}]"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise row.bad(
                "row-value-type", column=column, expected="[question, answer]", found=_type(exchange)
            )
        question, answer = (row.filled(text, column) for text in exchange)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt, query = row.string(row.need("prompt"), row.column("prompt")), row.get("query") or ""
    asked = "\n".join(part for part in (prompt, row.string(query, row.column("query"))) if part)
    return [*messages, {"role": "user", "content": row.filled(asked, row.column("prompt"))}]


def _answer(row: _Row) -> dict[str, Any]:
    return {"role": "assistant", "content": row.filled(row.need("response"), row.column("response"))}


def _choice(row: _Row, key: str) -> dict[str, Any]:
    value, column = row.need(key), row.column(key)
    if isinstance(value, dict):
        return _message(row, value, column)
    return {"role": "assistant", "content": row.filled(value, column)}


def _message(row: _Row, turn: Any, column: str) -> dict[str, Any]:
    tags = row.dataset.tags
    if not isinstance(turn, dict):
        raise row.bad("row-value-type", column=column, expected="object", found=_type(turn))
    if tags["role_tag"] not in turn:
        raise row.bad("row-without-column", column=f"{column}.{tags['role_tag']}", columns=_names(turn))
    said, column = turn.get(tags["content_tag"]), f"{column}.{tags['content_tag']}"
    spoken_by = turn[tags["role_tag"]]
    roles = {
        tags["system_tag"]: "system", tags["user_tag"]: "user", tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool", tags["function_tag"]: "function",
    }  # fmt: skip
    role = roles.get(spoken_by) if isinstance(spoken_by, str) else None
    if role is None:
        raise row.bad("row-role", column=column, found=spoken_by, known=_names(roles))
    if role == "function":
        return {"role": "assistant", "content": "", "tool_calls": _calls(row, said, column)}
    message: dict[str, Any] = {"role": role}
    if reasoning := turn.get("reasoning_content"):
        message["reasoning_content"] = row.string(reasoning, f"{column}.reasoning_content")
    if calls := turn.get("tool_calls"):
        return message | {"content": row.string(said or "", column), "tool_calls": _calls(row, calls, column)}
    # A tool may answer with nothing, and an empty system message is a way to turn a template's own off.
    return message | {"content": (row.string if role in ("tool", "system") else row.filled)(said, column)}


def _calls(row: _Row, value: Any, column: str) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, with the arguments as an object, which is what chat templates expect."""
    calls = _parsed(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.bad(
                "row-value-type", column=column, expected='{"name", "arguments"}', found=_type(call)
            )
        arguments = _parsed(function.get("arguments") or {})
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(row: _Row) -> list[dict[str, Any]] | None:
    value = row.get("tools")
    if not value:
        return None
    tools = row.items(value, row.column("tools"))
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _in_order(row: _Row, messages: list[dict[str, Any]], *last: str) -> list[dict[str, Any]]:
    """The messages, if whoever speaks may speak then, and the last one is among `last`."""
    before = ""
    for number, message in enumerate(messages, start=1):
        if message["role"] not in MAY_FOLLOW[before]:
            raise row.bad(
                "row-order", number=number, expected=_names(MAY_FOLLOW[before]), found=message["role"]
            )
        before = "call" if message.get("tool_calls") else message["role"]
    if before not in last:
        if "assistant" in last and not any(message["role"] == "assistant" for message in messages):
            raise row.bad("row-without-answer")
        raise row.bad("row-last", expected=_names(last), found=before or "—")
    return messages


# ---------------------------------------------------------------------------------------- small things


def _expect(value: Any, shape: type, code: str, **values: Any) -> None:
    if not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
        raise Refusal(problem(code, found=_type(value), **values))


def _parsed(value: Any) -> Any:
    """What a string holds if it is the JSON of a list or an object, else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _type(value: Any) -> str:
    """The word JSON has for it."""
    words = {str: "string", bool: "true/false", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)


def _names(names: Any) -> str:
    return ", ".join(map(str, names)) or "—"


def _written(example: Example) -> str:
    if "text" in example:
        return example["text"]
    turns = [*example["messages"], *example.get("chosen", ()), *example.get("rejected", ())]
    return "\n".join(turn["content"] for turn in turns)
