"""Derive new data sets: without duplicate or similar rows, or split in two by a seed. The original stays as it is.

New files are written as JSON lines with unchanged rows, and described in dataset_info.json like the original.
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.data import dataset_info_edits, uploads
from engine.data.datasets import Dataset, count_rows, entries, find
from engine.data.near_duplicates import NearDuplicate, near_duplicates
from engine.data.row_files import Place
from engine.data.row_values import without_nulls
from engine.data.validation import repeated_rows

PROGRESS_INTERVAL_ROWS = 5_000  # rows
MIN_SIMILARITY = 0.5  # below, texts with the same instruction would count as similar
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class DerivedDatasets:
    """Names of the new data sets; the number of rows in each and, under "left out", of those that are in none.
    `similar`: of these, those that are similar to an earlier row without being equal to one."""

    names: list[str]
    counts: Mapping[str, int]
    similar: Sequence[NearDuplicate] = ()


def deduplicate(data_dir: Path, name: str, similarity: float = 1.0, on_rows: OnRows | None = None) -> DerivedDatasets:
    """Write the set without rows that equal an earlier one or, with `similarity` below 1, whose text is at least as
    similar to that of an earlier one. Raises Refusal if there are none, or for another similarity than 0.5 to 1."""
    check_similarity(similarity)
    dataset = find(data_dir, name)
    repeats = list(repeated_rows(dataset, on_rows))
    near = near_duplicates(dataset, similarity, on_rows) if similarity < 1 else {}
    taken = (not (is_repeat or number in near) for number, is_repeat in enumerate(repeats))
    if not any(repeats) and not near:
        raise Refusal(problem("nothing-repeated" if similarity == 1 else "nothing-similar", name=name))
    similar = [pair for number, pair in near.items() if not repeats[number]]
    return replace(_write_parts(data_dir, dataset, {f"{name}-unique": taken}), similar=similar)


def check_similarity(similarity: float) -> None:
    """Raises Refusal for a similarity that `deduplicate` does not take."""
    if not MIN_SIMILARITY <= similarity <= 1:
        raise Refusal(problem("similarity-range", given=similarity))


def split(data_dir: Path, name: str, share: float, seed: int, on_rows: OnRows | None = None) -> DerivedDatasets:
    """Write a share of the rows, sampled with the seed, into a set for evaluation, and the others into one for
    training."""
    if not 0 < share < 1:
        raise Refusal(problem("split-share", share=share))
    dataset = find(data_dir, name)
    count = count_rows(dataset)
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise Refusal(problem("split-nothing", name=name, rows=count, share=share))
    chosen = frozenset(random.Random(seed).sample(range(count), held_out))
    parts = {
        f"{name}-train": (i not in chosen for i in range(count)),
        f"{name}-test": (i in chosen for i in range(count)),
    }
    return _write_parts(data_dir, dataset, parts, on_rows)


def _json_row(place: Place, row: Any) -> Any:
    """A row as JSON; rows from Parquet without the nulls that fill up their objects, which would have a meaning in
    JSON."""
    if place.file.suffix.lower() != ".parquet" or not isinstance(row, dict):
        return row
    return {column: without_nulls(value) for column, value in row.items()}


def _json_value(value: Any) -> str:
    """A value that JSON does not have: the content of an image as a data URL, a date as text."""
    if isinstance(value, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
    return str(value)


def _write_parts(
    data_dir: Path, dataset: Dataset, parts: Mapping[str, Iterable[bool]], on_rows: OnRows | None = None
) -> DerivedDatasets:
    """One pass over the set; each part decides for every row whether it takes it. Invalid rows are left out."""
    entry = dataset_info_edits.entry_of(data_dir, dataset.name)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=uploads.ARRIVING) as folder:
        files = {name: Path(folder) / f"{uploads.safe_name(name)}.jsonl" for name in parts}
        streams = {name: file.open("w", encoding="utf-8") for name, file in files.items()}
        counts = dict.fromkeys([*parts, "left out"], 0)
        takes: dict[str, Iterator[bool]] = {name: iter(chosen) for name, chosen in parts.items()}
        try:
            for number, (place, row) in enumerate(entries(dataset), start=1):
                if on_rows and number % PROGRESS_INTERVAL_ROWS == 0:
                    on_rows(number)
                line = (
                    ""
                    if isinstance(row, Problem)
                    else json.dumps(_json_row(place, row), ensure_ascii=False, default=_json_value) + "\n"
                )
                targets = [name for name, take in takes.items() if next(take)]
                target = targets[0] if targets and line else "left out"
                counts[target] += 1
                if target in streams:
                    streams[target].write(line)
        finally:
            for stream in streams.values():
                stream.close()
        made = []
        # Next to the file they come from, since images are found from there; but not into a folder that is a data set.
        single = data_dir / str(entry.get("file_name"))
        folder_of_parts = single.parent if single.is_file() else data_dir
        for name, file in files.items():
            placed = str(uploads.place(file, folder_of_parts).relative_to(data_dir))
            made.append(
                dataset_info_edits.add(data_dir, name, dataset_info_edits.derived_entry(entry, dataset, placed))
            )
    return DerivedDatasets(
        made,
        {new: counts[name] for new, name in zip(made, parts, strict=True)} | {"left out": counts["left out"]},
    )
