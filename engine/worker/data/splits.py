"""Which rows are trained on, how often, and which are measured on; and the files that are written of them.

A row is chosen by its number and the seed alone, so that the choice does not depend on who prepared it. Tables of
examples pass through one after the other, and none of them is kept: text may be larger than memory.
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
from engine.worker.data.examples import COLUMNS, FATES, IDS, IGNORED, USABLE
from engine.worker.data.packing import SCHEMA as PACKED
from engine.worker.data.packing import packed
from engine.worker.data.turn_weights import WEIGHTS, weights_column

TOGETHER = 1 << 22  # tokens that are packed at a time: many packs, and not much memory
PACKS = 500  # at a time, at the least
ROWS = 1000  # rows written at a time, so that a reader needs not much memory either


def set_aside(rows: int, count: int, seed: int) -> np.ndarray:
    """Which of so many rows are measured on (bool): `count` of them by the seed."""
    return _some(rows, count, seed)


def times(trained: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """How often each row is trained on (uint16), of those that `trained` (bool) says.

    Weight 2.5 is every row twice, and a random half of them once more.
    """
    whole, part = divmod(weight, 1)
    numbers = np.flatnonzero(trained)
    often = np.where(trained, np.uint16(whole), np.uint16(0))
    often[numbers[_some(len(numbers), round(len(numbers) * part), seed)]] += 1
    return often


def _some(rows: int, count: int, seed: int) -> np.ndarray:
    chosen = np.zeros(rows, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return chosen


class Split:
    """The file of one split, and counts of what went into it and what did not. To be closed."""

    def __init__(self, path: Path, form: Form, max_length: int, packing: bool, weighted: bool = False):
        """`weighted`: some row of the run has weights, so that all of them are written with some."""
        self.form, self.max_length, self.packing, self.weighted = form, max_length, packing, weighted
        self.columns = [*COLUMNS[form], *(["weights"] if weighted else [])]
        self.schema = PACKED if packing else pa.schema(list(COLUMNS[form].items()))
        if weighted:
            self.schema = self.schema.append(pa.field("weights", WEIGHTS))
        self.sink = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, self.schema)
        self.waiting: list[pa.RecordBatch] = []  # to be packed
        self.tokens_waiting = 0
        self.fates: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()  # rows of which the template left out something
        self.longest = 0

    def add(self, table: pa.RecordBatch, often: np.ndarray) -> None:
        """The rows of a table (`engine.worker.data.examples.table`), each as often as `often` says."""
        fate = table.column("fate").to_numpy()
        for number, count in enumerate(
            np.bincount(fate, weights=often, minlength=len(FATES)).astype(int).tolist()
        ):
            self.fates[FATES[number]] += count
        usable = np.flatnonzero((fate < USABLE) & (often > 0))
        if len(usable) == len(fate) and (often == 1).all():
            chosen = table
        else:
            chosen = table.take(pa.array(np.repeat(usable, often[usable])))
        self._count(chosen)
        if self.weighted and "weights" not in chosen.schema.names:
            chosen = chosen.append_column("weights", weights_column(chosen.column("labels"), IGNORED, ()))
        chosen = chosen.select(self.columns)
        if self.form == "text":
            chosen = windows(chosen, self.max_length)
        if not self.packing:
            self._write(chosen)
            return
        self.waiting.append(chosen)
        self.tokens_waiting += len(chosen.column("input_ids").flatten())
        if self.tokens_waiting >= max(TOGETHER, PACKS * self.max_length):
            self._pack()

    def close(self) -> dict[str, Any]:
        """Counts of examples, rows, tokens and trained tokens, of what was cut and what was left out."""
        self._pack()
        self.stream.close()
        self.sink.close()
        fates = {f"rows_{fate}": count for fate, count in self.fates.items() if count}
        lost = {word: count for word, count in self.lost.items() if count}
        return {**self.counted, "rows": self.fates.total(), "longest": self.longest, **fates, "lost": lost}

    def _count(self, table: pa.RecordBatch) -> None:
        lengths = {
            name: table.column(name).value_lengths().to_numpy(zero_copy_only=False)
            for name, kind in COLUMNS[self.form].items()
            if kind == IDS and name != "labels"
        }
        first, *others = lengths.values()
        if "labels" in COLUMNS[self.form]:
            trained = int((table.column("labels").flatten().to_numpy() != IGNORED).sum())
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
                self._write(packed(batch, self.max_length))

    def _write(self, batch: pa.RecordBatch) -> None:
        self.counted["examples"] += batch.num_rows
        for start in range(0, batch.num_rows, ROWS):
            self.stream.write_batch(batch.slice(start, ROWS).cast(self.schema))


def windows(batch: pa.RecordBatch, max_length: int) -> pa.RecordBatch:
    """Each document as consecutive examples of at most `max_length` tokens; nothing is thrown away.

    A last token that would be alone, the end of its document, takes the one before with it: it is to be learned, too.
    """
    ids = batch.column("input_ids")
    offsets = ids.offsets.to_numpy()
    lengths = np.diff(offsets)
    counts = -(-lengths // max_length)
    number = np.arange(counts.sum()) - np.repeat(
        counts.cumsum() - counts, counts
    )  # of a window in its document
    starts = np.repeat(offsets[:-1], counts) + number * max_length
    starts[counts.cumsum()[(counts > 1) & (lengths % max_length == 1)] - 1] -= 1
    cuts = pa.array(np.append(starts, offsets[-1]).astype(np.int32))
    columns = [pa.ListArray.from_arrays(cuts, column.values) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def read(path: Path) -> Iterator[pa.RecordBatch]:
    """The tables of a file, not copied into memory."""
    with pa.memory_map(str(path)) as source:
        yield from pa.ipc.open_stream(source)
