"""The progress of a run: its phase and ETA, its curves. Only new parts of the files are read.

A run may log a million lines and a gigabyte, and a page asks every two seconds. So a curve is read once and then
continued, and kept in a bounded number of points, each with the mean, lowest and highest of its neighbours.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from engine.core import regular_files
from engine.core.rundir import RunDir, read_object
from engine.runs import facts
from engine.runs.facts import AXES
from engine.runs.run import Run

MAX_POINTS = 2048  # points kept of a curve; halved when there are twice as many
CHUNK_BYTES = 1 << 21  # bytes of a metrics file parsed at a time
CACHE_FILE = ".curves.npz"  # next to a metrics file
CACHE_AFTER_BYTES = 4 << 20  # the cache is rewritten after this many new bytes
MIN_ROWS_FOR_PYARROW = 500  # with fewer lines, importing pyarrow is not worth the memory
NUMBER_BYTES = b"0123456789.+-eE"
# Bytes that occur in names but never in numbers, which may contain an e.
NAME_BYTES = b'abcdfghijklmnopqrstuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ_/{}" '


@dataclass(frozen=True)
class Progress:
    """What a run is doing. `fraction` is that of the whole run in training, else of the phase; None if unknown."""

    # waiting, preparing, downloading, loading, training, waiting for space, evaluating, tasks, judging, saving, done
    phase: str
    done: int
    total: int | None
    unit: str
    fraction: float | None
    eta_s: float | None
    tokens_per_s: float | None
    loss: float | None


@dataclass(frozen=True)
class Series:
    """One curve; all arrays of shape (points,). `time` is in seconds of training since the start, `tokens` is the
    number of tokens trained on until then: NaN in a run that does not count them."""

    step: np.ndarray
    epoch: np.ndarray
    time: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    tokens: np.ndarray


def progress(run: Run) -> Progress:
    """The last reported phase of a run and its progress."""
    reported = read_object(run.dir.progress)
    phase = {"queued": "waiting", "finished": "done"}.get(run.state) or reported.get("phase", "preparing")
    done, total = reported.get("done", 0), reported.get("total")
    fraction = 1.0 if run.state == "finished" else done / total if total else None
    eta = None
    if not run.final and total and done > reported.get("began_with", 0):
        eta = (total - done) * (reported["at"] - reported["began"]) / (done - reported["began_with"])
    curve = curves(run)
    return Progress(
        phase,
        done,
        total,
        reported.get("unit", ""),
        fraction,
        eta,
        _rate(curve.get("num_tokens")),
        _last_value(curve),
    )


def _rate(tokens: Series | None) -> float | None:
    """Tokens per second over the last few points."""
    if tokens is None or len(tokens.value) < 2:
        return None
    first = max(len(tokens.value) - 6, 0)
    seconds = tokens.time[-1] - tokens.time[first]
    return float((tokens.high[-1] - tokens.high[first]) / seconds) if seconds > 0 else None


def _last_value(curve: Mapping[str, Series], name: str = "loss") -> float | None:
    values = curve[name].value if name in curve else ()
    known = [value for value in values[-3:] if not np.isnan(value)]
    return float(known[-1]) if known else None


def headline_curve(run: Run) -> str:
    """The name of a run's main curve, which depends on its stage."""
    return facts.headline_curve(run.kind, run.facts.stage)


def sparkline(run: Run) -> list[float]:
    """That curve in at most 32 points."""
    path, name = run.dir.metrics, headline_curve(run)
    # A run in progress changes before the next request, so caching its states would be useless.
    return list(_sparkline_while_unchanged(path, *_stamp(path), name) if run.final else _sparkline(path, name))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4096)
def _sparkline_while_unchanged(path: Path, _changed: int, size: int, name: str) -> tuple[float, ...]:
    return _sparkline(path, name) if size else ()


def _sparkline(path: Path, name: str) -> tuple[float, ...]:
    curve = _reader(path).read()
    if name not in curve:
        return ()
    values = curve[name].value
    values = values[~np.isnan(values)]
    parts = np.array_split(values, min(32, len(values))) if len(values) else []
    return tuple(float(part.mean()) for part in parts)


def curves(run: Run) -> dict[str, Series]:
    """All logged curves, by name. Cheap to call again: only new lines are read."""
    return _reader(run.dir.metrics).read()


def read_long_curves(run: RunDir) -> None:
    """Read the curves of a run with much output once, so that the page need not wait for them."""
    with contextlib.suppress(OSError):
        if run.metrics.stat().st_size > CACHE_AFTER_BYTES:
            _reader(run.metrics).read()


@lru_cache(maxsize=256)
def _reader(path: Path) -> _CurveReader:
    return _CurveReader(path)


class _CurveReader:
    """Follows one metrics file. The curves of a long file are cached next to it for the next reader."""

    def __init__(self, path: Path):
        self.path, self.busy = path, threading.Lock()
        self.beside = path.with_name(CACHE_FILE)
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self.inode, self.offset, self.kept = inode, 0, 0
        self.growing: dict[str, _GrowingCurve] = {}

    def _recall(self, file: Any) -> None:
        """Continue from the cache, if the file still begins as it did then."""
        try:
            with np.load(self.beside) as kept:
                offset, end = int(kept["offset"]), kept["end"].tobytes()
                file.seek(offset - len(end))
                if file.read(len(end)) == end:
                    tables = zip(kept["names"].tolist(), kept["strides"].tolist(), strict=True)
                    self.growing = {
                        name: _GrowingCurve(kept[f"merged{number}"], kept[f"fresh{number}"], stride)
                        for number, (name, stride) in enumerate(tables)
                    }
                    self.offset = self.kept = offset
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # it is missing or invalid

    def _keep(self, file: Any) -> None:
        size = min(self.offset, 256)
        file.seek(self.offset - size)
        tables = {
            f"{part}{number}": getattr(growing, part)
            for number, growing in enumerate(self.growing.values())
            for part in ("merged", "fresh")
        }
        # Atomically, and with a temporary name of this process, because two studios may read one run.
        partial = self.beside.with_suffix(f".{os.getpid()}.npz")
        with contextlib.suppress(OSError):  # without write permission, it is read again each time
            end = np.frombuffer(file.read(size), np.uint8)
            strides = [growing.stride for growing in self.growing.values()]
            np.savez(partial, offset=self.offset, end=end, names=list(self.growing), strides=strides, **tables)
            partial.replace(self.beside)
        self.kept = self.offset

    def read(self) -> dict[str, Series]:
        with self.busy:
            try:
                with regular_files.open_regular(self.path) as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino != self.inode or status.st_size < self.offset:
                        self._begin(status.st_ino)
                        self._recall(file)
                    file.seek(self.offset)
                    while lines := self._whole_lines(file):
                        self._take(lines)
                    if self.offset - self.kept > CACHE_AFTER_BYTES:
                        self._keep(file)
            except OSError:  # not there yet, or not readable
                self._begin(0)
            return _with_token_counts({name: growing.table() for name, growing in self.growing.items()})

    def _whole_lines(self, file: Any) -> bytes:
        """The next lines up to about a chunk; empty while the last line is still being written."""
        text = file.read(CHUNK_BYTES)
        end = text.rfind(b"\n") + 1
        if not end:
            return b""
        file.seek(end - len(text), os.SEEK_CUR)
        self.offset += end
        return text[:end]

    def _take(self, text: bytes) -> None:
        for name, points in _points(text).items():
            self.growing.setdefault(name, _GrowingCurve()).add(points)


def _with_token_counts(tables: Mapping[str, np.ndarray]) -> dict[str, Series]:
    """The curves, each with the number of tokens at its points: as counted there, or interpolated."""
    counts = tables.get("num_tokens", np.empty((0, 6)))
    counts = counts[np.isfinite(counts[:, 5])]
    steps, counted = (np.append(0.0, counts[:, column]) for column in (0, 5))
    return {
        name: _series(table, np.interp(table[:, 0], steps, counted) if len(counts) else np.full(len(table), np.nan))
        for name, table in tables.items()
    }


def _series(table: np.ndarray, tokens: np.ndarray) -> Series:
    step, epoch, time, value, low, high = (table[:, column] for column in range(6))
    return Series(step, epoch, time, value, low, high, tokens)


def _points(text: bytes) -> dict[str, np.ndarray]:
    """Name → its values in complete lines, in their order: step, epoch, time, and mean, lowest and highest value.

    Lines of one kind (of training, of validation) are equal except for their numbers, and are converted at once.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for numbers, alike in _lines_by_shape(text):
        for line_numbers, column in _columns(numbers, alike):
            place = line_numbers, column["step"], np.nan_to_num(column["epoch"]), column["time"]
            for name in (key for key in column if key not in AXES):
                parts.setdefault(name, []).append(np.column_stack([*place, *[column[name]] * 3]))
    return {name: _in_order(arrays)[:, 1:] for name, arrays in parts.items()}


def _lines_by_shape(text: bytes) -> Iterator[tuple[np.ndarray, bytes]]:
    """For each kind of lines, equal except for the digits of numbers: their indices among all lines, and their text."""
    bare = text.translate(None, NUMBER_BYTES)
    first = bare[: bare.index(b"\n") + 1]
    count = len(bare) // len(first)
    if bare == first * count:
        yield np.arange(count), text[:-1]
        return
    kinds, lines = bare.split(b"\n")[:-1], text.split(b"\n")
    known = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    which = np.fromiter(map(known.__getitem__, kinds), np.int64, len(kinds))
    for kind in known.values():
        numbers = np.flatnonzero(which == kind)
        yield numbers, b"\n".join([lines[number] for number in numbers])


def _in_order(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    together = np.concatenate(parts)
    return together[np.argsort(together[:, 0], kind="stable")]


def _columns(numbers: np.ndarray, alike: bytes) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """For lines of one kind: the indices of those that can be parsed, and their values by name."""
    rows = _as_rows(alike, len(numbers))
    if rows is not None:
        yield numbers, rows
        return
    try:
        objects = from_json(b"[" + alike.replace(b"\n", b",") + b"]", allow_inf_nan=True)
    except ValueError:  # one of them is damaged
        objects = map(_parse_line, alike.split(b"\n"))
    # Names may differ in a digit, which then belongs to a name and not to a number.
    by_names: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
    for number, record in zip(numbers, objects, strict=False):  # an empty line has none
        if _has_axes(record):
            by_names.setdefault(tuple(record), []).append((number, record))
    for names, numbered in by_names.items():
        line_numbers, records = zip(*numbered, strict=True)
        table = np.array([tuple(record.values()) for record in records], dtype=np.float64).T  # null means NaN
        yield np.array(line_numbers), dict(zip(names, table, strict=True))


def _as_rows(alike: bytes, count: int) -> dict[str, np.ndarray] | None:
    """The values by name, if there are many lines with the same names and only numbers; otherwise None.

    Without the letters of its names, such a line is a comma-separated row, which pyarrow reads faster than JSON: the
    remains of a name, which are constant, alternate with numbers.
    """
    line = alike[: alike.find(b"\n")]
    first = _parse_line(line) if count >= MIN_ROWS_FOR_PYARROW else None
    if not first or any(type(value) not in (int, float) for value in first.values()):
        return None
    if not line.count(b",") + 1 == line.count(b":") == len(first):
        return None
    from pyarrow import ArrowInvalid, binary, csv, dictionary, float64, int32

    rows = alike.translate(bytes.maketrans(b":", b","), NAME_BYTES)
    name_columns, number_columns = ([f"f{column}" for column in range(begin, 2 * len(first), 2)] for begin in (0, 1))
    types = dict.fromkeys(name_columns, dictionary(int32(), binary())) | dict.fromkeys(number_columns, float64())
    try:
        table = csv.read_csv(
            io.BytesIO(rows),
            csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=len(rows) + 1),
            csv.ParseOptions(quote_char=False),
            csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except ArrowInvalid:
        return None
    if any(len(chunk.dictionary) > 1 for column in name_columns for chunk in table[column].chunks):
        return None
    return {name: table[column].to_numpy() for name, column in zip(first, number_columns, strict=True)}


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        value = from_json(line, allow_inf_nan=True)
    except ValueError:
        return None
    return value if _has_axes(value) else None


def _has_axes(value: Any) -> bool:
    return isinstance(value, dict) and set(AXES) <= set(value)


class _GrowingCurve:
    """A curve that keeps its shape in a bounded number of points. Columns: step, epoch, time, mean, low, high."""

    def __init__(self, merged: np.ndarray | None = None, fresh: np.ndarray | None = None, stride: int = 1):
        self.merged = np.empty((0, 6)) if merged is None else merged  # each covers `stride` logged points
        self.fresh = np.empty((0, 6)) if fresh is None else fresh  # not yet enough for another point
        self.stride = stride

    def add(self, points: np.ndarray) -> None:
        # A resumed run goes back to its checkpoint: what it logs from there replaces the old points.
        steps = points[:, 0]
        if not (np.diff(steps) > 0).all():
            later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
            points = points[steps < later]
        first = points[0, 0]
        self.merged = self.merged[self.merged[:, 0] < first]
        self.fresh = np.concatenate([self.fresh[self.fresh[:, 0] < first], points])
        self._merge()
        while len(self.merged) > 2 * MAX_POINTS:
            self.fresh = np.concatenate([self.merged[len(self.merged) // 2 * 2 :], self.fresh])
            self.merged, self.stride = _merged_by(self.merged, 2), self.stride * 2

    def _merge(self) -> None:
        whole = len(self.fresh) // self.stride * self.stride
        if whole:
            self.merged = np.concatenate([self.merged, _merged_by(self.fresh[:whole], self.stride)])
            self.fresh = self.fresh[whole:]

    def table(self) -> np.ndarray:
        return np.concatenate([self.merged, self.fresh]) if self.stride > 1 else self.merged


def _merged_by(points: np.ndarray, by: int) -> np.ndarray:
    """Merges every `by` neighbours, a power of two: the last one's place, and their mean, lowest and highest value."""
    with np.errstate(all="ignore"):
        while by > 1:
            pairs = points[: len(points) // 2 * 2].reshape(-1, 2, 6)
            first, second = pairs[:, 0], pairs[:, 1]
            points, by = second.copy(), by // 2
            points[:, 3] = (first[:, 3] + second[:, 3]) / 2
            np.minimum(first[:, 4], second[:, 4], out=points[:, 4])
            np.maximum(first[:, 5], second[:, 5], out=points[:, 5])
    return points
