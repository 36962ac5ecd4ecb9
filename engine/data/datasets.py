"""The rows of a data set: as they are in its files, or in the canonical form that a stage needs.

Whatever the files look like (alpaca, sharegpt, openai, TRL's; json, jsonl, csv, tsv, parquet, txt), `examples` yields
one form, described in `engine.data.conversion`. A row that does not fit becomes a Problem with file and line, and the
others are still read. `engine.data.dataset_info` lists the data sets; tokens are left to `engine.worker`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.stages import Form
from engine.data import row_files
from engine.data.conversion import Example, convert
from engine.data.dataset_info import INFO_FILE, Dataset, dataset_of, find, read_dataset_info
from engine.data.row_files import Entry, OnBad, Place
from engine.data.row_values import Row
from engine.data.text_lines import Located

__all__ = [
    "INFO_FILE", "Dataset", "Example", "Place", "convert_rows", "count_rows", "dataset_of",
    "entries", "example", "examples", "files_of", "find", "read_dataset_info", "rows",
]  # fmt: skip


def entries(dataset: Dataset) -> Iterator[Entry]:
    """The rows as they are in the files, lazily, the first `num_samples`; a Problem in the place of what is not a row.

    Raises Refusal if the data set itself cannot be used.
    """
    files, encoding = files_of(dataset), dataset.encoding
    every = (entry for file in files for entry in row_files.entries(file, encoding=encoding))
    return every if dataset.num_samples is None else _first_rows(every, dataset.num_samples)


def _first_rows(every: Iterable[Entry], count: int) -> Iterator[Entry]:
    for place, row in every:
        yield place, row
        count -= isinstance(row, dict)
        if not count:
            return


def rows(dataset: Dataset, on_bad: OnBad) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The same without what is not a row, which goes to `on_bad`. Raises Refusal as `entries` does."""
    return row_files.valid_rows(entries(dataset), on_bad)


def files_of(dataset: Dataset) -> tuple[Path, ...]:
    """Its files. Raises Refusal if the data set itself cannot be used."""
    if dataset.problem:
        raise Refusal(dataset.problem)
    if not dataset.files:
        raise Refusal(problem("dataset-on-hub", name=dataset.name, hub=dataset.hub))
    return dataset.files


def count_rows(dataset: Dataset) -> int:
    """The number of rows, good or bad. Fast, and cached until a file changes. Raises Refusal as `entries` does."""
    total = sum(row_files.count(file, dataset.encoding) for file in files_of(dataset))
    return total if dataset.num_samples is None else min(total, dataset.num_samples)


def examples(dataset: Dataset, on_bad: OnBad, form: Form | None = None) -> Iterator[Example]:
    """The rows in a canonical form (see `engine.data.conversion`), that of their own kind by default; bad rows go to
    `on_bad` and are left out.

    Raises Refusal if the data set itself cannot be used.
    """
    return convert_rows(dataset, rows(dataset, on_bad), on_bad, form)


def convert_rows(
    dataset: Dataset,
    readable: Iterable[tuple[Located, Mapping[str, Any]]],
    on_bad: OnBad,
    form: Form | None = None,
) -> Iterator[Example]:
    """The same for rows that have already been read."""
    for place, row in readable:
        try:
            yield convert(Row(dataset, place, row), form or dataset.kind)
        except Refusal as refusal:
            on_bad(refusal.problems[0])


def example(dataset: Dataset, place: Place, row: Mapping[str, Any], form: Form | None = None) -> Example:
    """One row in a canonical form, that of its own kind by default. Raises Refusal if something is wrong with it."""
    return convert(Row(dataset, place, row), form or dataset.kind)
