"""Whether a data set can be read at all, judged from the beginning and end of its files: cheap enough for a list.

What this does not notice is found by a check of the whole set (`engine.data.validation`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from pydantic_core import from_json

from engine.core.problems import Problem, Refusal, problem
from engine.data import row_files
from engine.data.dataset_info import Dataset
from engine.data.encodings import encoding_of
from engine.data.json_layout import layout

ROWS_READ = 20
TAIL_BYTES = 1 << 16  # bytes of a file's end
# Layout of a JSON file → what closes its last row, or its list of rows.
CLOSED_BY = {"lines": b"}", "values": b"}", "wrapped": b"}", "array": b"]"}


def flaw(dataset: Dataset) -> Problem | None:
    """Why a data set cannot be read completely; None if no problem is visible, and for sets on a hub."""
    if dataset.problem or not dataset.files:
        return dataset.problem
    try:
        stamps = tuple((file, *row_files.version(file)) for file in dataset.files)
    except OSError as error:
        why = error.strerror or error
        return problem("data-file-unreadable", file=Path(str(error.filename)).name, why=why)
    return _flaw(dataset.name, dataset.encoding, stamps)


def sound_first(catalogue: Iterable[Dataset]) -> list[Dataset]:
    """The data sets in their order, those with a flaw after all others."""
    return sorted(catalogue, key=lambda dataset: flaw(dataset) is not None)


def sound_names(catalogue: Iterable[Dataset]) -> list[str]:
    """The names of those without a flaw."""
    return [dataset.name for dataset in catalogue if flaw(dataset) is None]


@lru_cache(maxsize=1024)
def _flaw(name: str, encoding: str, stamps: tuple[tuple[Path, int, int], ...]) -> Problem | None:
    """Of many files only the first and the last are checked: an interrupted copy lacks its end."""
    files = [file for file, _, _ in stamps]
    empty = True
    for file in dict.fromkeys((files[0], files[-1])):
        rows = [row for _, row in islice(row_files.entries(file, encoding=encoding), ROWS_READ)]
        if rows and all(isinstance(row, Problem) for row in rows):
            return rows[0]
        if rows and _ends_early(file, encoding):
            return problem("file-ends-early", file=file.name)
        empty = empty and not rows
    return problem("dataset-empty", name=name) if empty and len(files) < 3 else None


def _ends_early(file: Path, encoding: str) -> bool:
    """Whether a JSON file in UTF-8 ends before the end of its last row or its list of rows."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return False
    try:
        shape = layout(file, encoding).shape
        if shape not in CLOSED_BY or encoding_of(file, encoding).name != "utf-8":
            return False
        with file.open("rb") as stream:
            stream.seek(max(file.stat().st_size - TAIL_BYTES, 0))
            end = stream.read().rstrip()
    except (OSError, Refusal):
        return False  # it has just been changed
    _, newline, last_line = end.rpartition(b"\n")
    if shape == "lines" and newline:
        return _is_cut(last_line)
    return bool(end) and not end.endswith(CLOSED_BY[shape])


def _is_cut(line: bytes) -> bool:
    try:
        from_json(line)
    except ValueError as error:
        return str(error).startswith("EOF while parsing")
    return False
