"""The rows of a data set → tables of examples on disk, block by block, in several processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from engine.core.problems import Problem
from engine.data.chunks import Block, ByteRange, InvalidByteRange, blocks, row_by_row
from engine.data.datasets import Dataset, Example, convert_rows, files_of
from engine.data.text_lines import Located
from engine.worker.data.examples import Encoder, examples_table
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.runtime.process_pool import ProcessPool

MAX_PROBLEMS_SHOWN = 20  # problems of bad rows that are kept per block, and per data set


@dataclass(frozen=True)
class Task:
    """A block of one of the data sets, and the path of its table."""

    dataset: int
    block: Block
    path: Path


@dataclass(frozen=True)
class Part:
    """The result of a block: a table of the `good` rows among its `read` rows, and the problems of the others.

    `entries` also counts what is not a row. `bad`: the first problems, each with the number of rows up to it. `end`:
    where the block ends in its file, if known. `broken`: it could not be read.
    """

    path: Path
    good: int = 0
    read: int = 0
    entries: int = 0
    bad: tuple[tuple[int, Problem], ...] = ()
    bad_count: int = 0
    end: int = 0
    broken: bool = False
    weighted: bool = False  # the table has weights
    pictured: bool = False  # the table has images
    notes: tuple[tuple[str, int, Problem], ...] = ()  # of rows that are used anyway: code, number, the first


def make_table(encoder: Encoder, datasets: Sequence[Dataset], task: Task) -> Part:
    """Reads a block and writes its table: the work of one process."""
    dataset, rows = datasets[task.dataset], _RowCounter()
    gc.disable()  # many small objects are created here, none of which is part of a cycle
    try:
        examples = list(convert_rows(dataset, rows.of(task.block), rows.refuse, encoder.form))
        made = encoder.examples(examples)
    except InvalidByteRange:
        return Part(task.path, broken=True)
    finally:
        gc.enable()
    refused = {number: example.reason for number, example in zip(rows.good, made, strict=True) if example.reason}
    rows.bad += _problems_with_places(refused, task.block)
    batch = examples_table(encoder.form, made).append_column("row", pa.array(rows.good, pa.uint32()))
    with pa.OSFile(str(task.path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return Part(
        task.path,
        len(made),
        rows.read,
        rows.read + rows.no_rows,
        tuple(rows.bad[:MAX_PROBLEMS_SHOWN]),
        len(rows.bad),
        task.block.end if isinstance(task.block, ByteRange) else 0,
        weighted="weights" in batch.schema.names,
        pictured=IMAGES_COLUMN in batch.schema.names,
        notes=_notes_by_code(examples),
    )


def _problems_with_places(refused: dict[int, Problem], block: Block) -> list[tuple[int, Problem]]:
    """The reasons with the places of their rows, for which the block is read again, because a place is valid only until
    the next."""
    rows = enumerate(block.rows(lambda _: None), start=1) if refused else ()
    return [(number, refused[number].at(place)) for number, (place, _) in rows if number in refused]


def _notes_by_code(examples: Sequence[Example]) -> tuple[tuple[str, int, Problem], ...]:
    noted: dict[str, list[Problem]] = {}
    for example in examples:
        for note in example.get("notes", ()):
            noted.setdefault(note.code, []).append(note)
    return tuple((code, len(notes), notes[0]) for code, notes in noted.items())


@dataclass
class _RowCounter:
    """Counts the rows of a block while they are read. `good`: the numbers of those that can be used."""

    read: int = 0
    no_rows: int = 0
    good: list[int] = field(default_factory=list)
    bad: list[tuple[int, Problem]] = field(default_factory=list)

    def of(self, block: Block) -> Iterator[tuple[Located, Example]]:
        for place, row in block.rows(self.no_row):
            self.read += 1
            self.good.append(self.read)
            yield place, row

    def no_row(self, reason: Problem) -> None:
        self.bad.append((self.read, reason))
        self.no_rows += 1

    def refuse(self, reason: Problem) -> None:
        self.bad.append((self.read, reason))
        self.good.pop()


@dataclass
class DatasetTables:
    """The tables of one data set, with at most `limit` good rows: the first ones."""

    dataset: Dataset
    number: int
    limit: int | None = None
    parts: list[Part] = field(default_factory=list)
    good: int = 0
    read: int = 0
    bad: list[Problem] = field(default_factory=list)
    bad_count: int = 0
    bytes_done: int = 0  # of its files
    notes: dict[str, tuple[int, Problem]] = field(default_factory=dict)  # code → number of rows, and the first

    def make(self, pool: ProcessPool, path: Callable[[], Path]) -> Iterator[None]:
        """Creates them, one at each step. Raises Refusal if the data set cannot be used at all."""
        for file in files_of(self.dataset):
            before, entries = self.bytes_done, 0
            source: Iterator[Block] | None = blocks(file, self.dataset.encoding)
            while source:
                results = pool.map(Task(self.number, block, path()) for block in source)
                source = None
                for part in results:
                    if part.broken:
                        results.close()
                        source = row_by_row(file, entries, self.dataset.encoding)
                        break
                    entries += part.entries
                    self._take(part)
                    self.bytes_done = before + part.end
                    yield
                    if self._full():
                        results.close()
                        self.bytes_done = before + file.stat().st_size
                        return
            self.bytes_done = before + file.stat().st_size

    def _full(self) -> bool:
        return self.good == self.limit or self.read == self.dataset.num_samples

    def _take(self, part: Part) -> None:
        """The part within the limit, of a part that crosses it."""
        most_read = part.read if self.dataset.num_samples is None else self.dataset.num_samples - self.read
        most_good = part.good if self.limit is None else self.limit - self.good
        if part.read > most_read or part.good > most_good:
            with pa.memory_map(str(part.path)) as source:
                numbers = pa.ipc.open_stream(source).read_all().column("row").to_numpy()
            good = min(int((numbers <= most_read).sum()), most_good)
            last = int(numbers[good - 1]) if good == most_good and self.limit is not None else most_read
            bad = tuple((number, reason) for number, reason in part.bad if number <= last)
            part = replace(part, good=good, read=last, bad=bad, bad_count=min(part.bad_count, len(bad)))
        for code, count, first in part.notes:
            before, earliest = self.notes.get(code, (0, first))
            self.notes[code] = before + count, earliest
        self.parts.append(part)
        self.good += part.good
        self.read += part.read
        self.bad_count += part.bad_count
        self.bad += [reason for _, reason in part.bad[: MAX_PROBLEMS_SHOWN - len(self.bad)]]
