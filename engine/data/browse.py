"""Read any row of a data set without reading all of it, and search for rows that contain a text.

The first access to a place far inside a file reads through the file once to find where its rows begin; later ones seek
directly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from engine.core.problems import Problem, Refusal
from engine.data import row_files
from engine.data.datasets import Dataset, count_rows, entries, example
from engine.data.row_files import PLACE_INTERVAL_ROWS, Entry, Place

MAX_PAGE_ROWS = 100  # rows per page


@dataclass(frozen=True)
class BrowsedRow:
    """A row as it is in the file, with its canonical form or the problem with it. `number` counts within the set, from
    1."""

    number: int
    place: Place
    row: Any
    example: dict[str, Any] | None
    problem: Problem | None


def page(dataset: Dataset, first: int, size: int) -> list[BrowsedRow]:
    """The rows from `first` on. Raises Refusal if the data set cannot be read."""
    size, first = min(max(size, 1), MAX_PAGE_ROWS), max(first, 1)
    return [_browsed_row(dataset, number, entry) for number, entry in islice(_numbered_entries(dataset, first), size)]


def search(
    dataset: Dataset, text: str, after: int, size: int, seconds: float = 2.0
) -> tuple[list[BrowsedRow], int | None]:
    """Rows after `after` that contain every word of `text`, ignoring case; and where to continue.

    None means that there are no more rows. Returns when it has `size` rows, or has searched for that many seconds.
    """
    words = text.casefold().split()
    deadline, matches = time.monotonic() + seconds, []
    for number, (place, row) in _numbered_entries(dataset, after + 1):
        hay = "\n".join(_text_values(row)).casefold()
        if all(word in hay for word in words):
            matches.append(_browsed_row(dataset, number, (place, row)))
        if len(matches) == min(size, MAX_PAGE_ROWS) or (number % 200 == 0 and time.monotonic() > deadline):
            return matches, number
    return matches, None


def _numbered_entries(dataset: Dataset, first: int) -> Iterator[tuple[int, Entry]]:
    """The rows with their numbers, from `first` on."""
    if first == 1:
        yield from enumerate(entries(dataset), start=1)
        return
    total, before = count_rows(dataset), 0
    for file in dataset.files:
        count = row_files.count(file, dataset.encoding)
        if first <= before + count:
            begin = max(first - before, 1)
            checkpoints = row_files.places(file, dataset.encoding)[0] if begin > PLACE_INTERVAL_ROWS else []
            start = checkpoints[(begin - 1) // PLACE_INTERVAL_ROWS] if checkpoints else None
            skipped = (begin - 1) % PLACE_INTERVAL_ROWS if checkpoints else begin - 1
            remaining = islice(row_files.entries(file, start, dataset.encoding), skipped, None)
            for number, entry in enumerate(remaining, start=before + begin):
                if number > total:
                    return
                yield number, entry
        before += count


def _browsed_row(dataset: Dataset, number: int, entry: Entry) -> BrowsedRow:
    place, row = entry
    if isinstance(row, Problem):
        return BrowsedRow(number, place, None, None, row)
    try:
        return BrowsedRow(number, place, row, example(dataset, place, row), None)
    except Refusal as refusal:
        return BrowsedRow(number, place, row, None, refusal.problems[0])


def _text_values(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for nested in value.values():
            yield from _text_values(nested)
    elif isinstance(value, list):
        for nested in value:
            yield from _text_values(nested)
    elif isinstance(value, (int, float)):
        yield str(value)


def sample_entries(dataset: Dataset, size: int) -> tuple[Iterator[Entry], int]:
    """At most `size` rows and the total number: all rows, or runs of rows spread evenly over the set."""
    total = count_rows(dataset)
    if total <= size:
        return entries(dataset), total
    segments = max(size // PLACE_INTERVAL_ROWS, 1)
    starts = [
        1 + (total // segments // PLACE_INTERVAL_ROWS * PLACE_INTERVAL_ROWS) * number for number in range(segments)
    ]
    sampled = (entry for start in starts for _, entry in islice(_numbered_entries(dataset, start), PLACE_INTERVAL_ROWS))
    return sampled, total
