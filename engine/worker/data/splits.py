"""Which rows are trained on, how often, and which are held out for validation; and the files written from them.

A row is chosen by its number and the seed alone, so that the choice does not depend on who prepared it. Tables of
examples pass through one after another and none is kept, since text may be larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.core.stages import Form
from engine.data.template_losses import LOSSES
from engine.worker.data.examples import (
    COLUMNS,
    IDS_TYPE,
    IGNORE_INDEX,
    ROW_STATUSES,
    USABLE_STATUSES,
)
from engine.worker.data.images_column import IMAGES_COLUMN, IMAGES_TYPE
from engine.worker.data.packing import PACKED_SCHEMA as PACKED
from engine.worker.data.packing import pack_examples
from engine.worker.data.turn_weights import WEIGHTS_TYPE, weights_column

TOKENS_PACKED_AT_ONCE = 1 << 22  # tokens that are packed at a time: many packs, but little memory
MIN_PACKS_AT_ONCE = 500  # minimum examples at a time
WRITTEN_ROWS_PER_BATCH = 1000  # rows written at a time, so that a reader needs little memory, too


def validation_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """Which of so many rows are held out (bool): `count` of them, chosen by the seed."""
    return _random_rows(rows, count, seed)


def repetitions(trained: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """How often each row is trained on (uint16), among those marked in `trained` (bool).

    Weight 2.5 means every row twice, and a random half of them once more.
    """
    whole, part = divmod(weight, 1)
    numbers = np.flatnonzero(trained)
    repeats = np.where(trained, np.uint16(whole), np.uint16(0))
    repeats[numbers[_random_rows(len(numbers), round(len(numbers) * part), seed)]] += 1
    return repeats


def _random_rows(rows: int, count: int, seed: int) -> np.ndarray:
    chosen = np.zeros(rows, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return chosen


class SplitWriter:
    """The file of one split, and counts of what went into it and what did not. To be closed."""

    def __init__(
        self,
        path: Path,
        form: Form,
        max_length: int,
        packing: bool,
        weighted: bool = False,
        pictured: bool = False,
    ):
        """`weighted`: some row of the run has weights, so all are written with weights; `pictured`: some row has
        images, which cannot be packed."""
        assert not (packing and pictured)
        self.form, self.max_length, self.packing, self.weighted = form, max_length, packing, weighted
        self.pictured = pictured
        self.columns = [*COLUMNS[form], *(["weights"] if weighted else []), *([IMAGES_COLUMN] if pictured else [])]
        self.schema = PACKED if packing else pa.schema(list(COLUMNS[form].items()))
        if weighted:
            self.schema = self.schema.append(pa.field("weights", WEIGHTS_TYPE))
        if pictured:
            self.schema = self.schema.append(pa.field(IMAGES_COLUMN, IMAGES_TYPE))
        self.sink = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, self.schema)
        self.waiting: list[pa.RecordBatch] = []  # to be packed
        self.tokens_waiting = 0
        self.status_counts: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()  # rows of which the template left out something
        self.longest = 0

    def add(self, table: pa.RecordBatch, repeats: np.ndarray) -> None:
        """The rows of a table (`engine.worker.data.examples.examples_table`), each as often as `often` says."""
        status = table.column("status").to_numpy()
        for number, count in enumerate(
            np.bincount(status, weights=repeats, minlength=len(ROW_STATUSES)).astype(int).tolist()
        ):
            self.status_counts[ROW_STATUSES[number]] += count
        usable = np.flatnonzero((status < USABLE_STATUSES) & (repeats > 0))
        if len(usable) == len(status) and (repeats == 1).all():
            chosen = table
        else:
            chosen = table.take(pa.array(np.repeat(usable, repeats[usable])))
        self._count(chosen)
        if self.weighted and "weights" not in chosen.schema.names:
            chosen = chosen.append_column("weights", weights_column(chosen.column("labels"), IGNORE_INDEX, ()))
        if self.pictured and IMAGES_COLUMN not in chosen.schema.names:
            chosen = chosen.append_column(IMAGES_COLUMN, pa.array([[]] * chosen.num_rows, IMAGES_TYPE))
        if self.pictured:
            self.counted["images"] += len(chosen.column(IMAGES_COLUMN).flatten())
        chosen = chosen.select(self.columns)
        if self.form == "text":
            chosen = windows(chosen, self.max_length)
        if not self.packing:
            self._write(chosen)
            return
        self.waiting.append(chosen)
        self.tokens_waiting += len(chosen.column("input_ids").flatten())
        if self.tokens_waiting >= max(TOKENS_PACKED_AT_ONCE, MIN_PACKS_AT_ONCE * self.max_length):
            self._pack()

    def close(self) -> dict[str, Any]:
        """Counts of examples, rows, tokens and trained tokens, of truncated rows and of rows left out."""
        self._pack()
        self.stream.close()
        self.sink.close()
        status_counts = {f"rows_{status}": count for status, count in self.status_counts.items() if count}
        lost = {word: count for word, count in self.lost.items() if count}
        return {
            **self.counted,
            "rows": self.status_counts.total(),
            "longest": self.longest,
            **status_counts,
            "lost": lost,
        }

    def _count(self, table: pa.RecordBatch) -> None:
        lengths = {
            name: table.column(name).value_lengths().to_numpy(zero_copy_only=False)
            for name, kind in COLUMNS[self.form].items()
            if kind == IDS_TYPE and name != "labels"
        }
        first, *others = lengths.values()
        if "labels" in COLUMNS[self.form]:
            trained = int((table.column("labels").flatten().to_numpy() != IGNORE_INDEX).sum())
        else:
            trained = sum(int(each.sum()) for each in others)
        together = first + np.max(others, axis=0) if others else np.minimum(first, self.max_length)
        self.longest = max(self.longest, int(together.max(initial=0)))
        self.counted.update(
            examples=0,
            tokens=sum(int(each.sum()) for each in lengths.values()),
            trained_tokens=trained,
            without_end=table.num_rows - table.column("ended").true_count,
        )
        lost = table.column("lost").to_numpy()
        self.lost.update({word: int((lost >> bit & 1).sum()) for bit, word in enumerate(LOSSES)})

    def _pack(self) -> None:
        if self.waiting:
            whole = pa.Table.from_batches(self.waiting).combine_chunks().to_batches()
            self.waiting, self.tokens_waiting = [], 0
            for batch in whole:
                self._write(pack_examples(batch, self.max_length))

    def _write(self, batch: pa.RecordBatch) -> None:
        self.counted["examples"] += batch.num_rows
        for start in range(0, batch.num_rows, WRITTEN_ROWS_PER_BATCH):
            self.stream.write_batch(batch.slice(start, WRITTEN_ROWS_PER_BATCH).cast(self.schema))


def windows(batch: pa.RecordBatch, max_length: int) -> pa.RecordBatch:
    """Each document as consecutive examples of at most `max_length` tokens; nothing is thrown away.

    If the last token, the end of the document, would be alone, it takes the previous one with it, because it has to be
    learned, too.
    """
    ids = batch.column("input_ids")
    offsets = ids.offsets.to_numpy()
    lengths = np.diff(offsets)
    counts = -(-lengths // max_length)
    number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # of a window in its document
    starts = np.repeat(offsets[:-1], counts) + number * max_length
    starts[counts.cumsum()[(counts > 1) & (lengths % max_length == 1)] - 1] -= 1
    cuts = pa.array(np.append(starts, offsets[-1]).astype(np.int32))
    columns = [pa.ListArray.from_arrays(cuts, column.values) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def read_tables(path: Path) -> Iterator[pa.RecordBatch]:
    """The tables of a file, not copied into memory."""
    with pa.memory_map(str(path)) as source:
        yield from pa.ipc.open_stream(source)
