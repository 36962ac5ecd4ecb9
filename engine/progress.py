"""How far a run is: its phase and ETA, its curves, the end of its log. Reads files, and only what is new in them.

A run may log a million lines and a gigabyte; a page asks every two seconds. So a curve is read once and then
continued, and kept in a bounded number of points, each the mean, lowest and highest of its neighbours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from engine.rundir import end_of, read_json
from engine.runs import Run

POINTS = 2048  # of a curve are kept, at most; halved when twice as many have come
CHUNK = 1 << 20  # bytes of a metrics file parsed at a time
AXES = ("step", "epoch", "time")


@dataclass(frozen=True)
class Progress:
    """What a run is doing. `fraction` is of the whole run once it trains, else of the phase; None if unknown."""

    phase: str  # waiting, preparing, downloading, loading, training, evaluating, saving, done
    done: int
    total: int | None
    unit: str
    fraction: float | None
    eta_s: float | None
    tokens_per_s: float | None
    loss: float | None


@dataclass(frozen=True)
class Series:
    """One curve; all arrays of shape (points,). `time` is in seconds of training since the start."""

    step: np.ndarray
    epoch: np.ndarray
    time: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def progress(run: Run) -> Progress:
    """The phase a run is in and how far, as of its last word."""
    said = read_json(run.dir.progress) or {}
    phase = {"queued": "waiting", "finished": "done"}.get(run.state) or said.get("phase", "preparing")
    done, total = said.get("done", 0), said.get("total")
    fraction = 1.0 if run.state == "finished" else done / total if total else None
    eta = None
    if not run.final and total and done > said.get("began_with", 0):
        eta = (total - done) * (said["at"] - said["began"]) / (done - said["began_with"])
    curve = curves(run)
    return Progress(
        phase, done, total, said.get("unit", ""), fraction, eta, _rate(curve.get("num_tokens")), _last(curve)
    )


def _rate(tokens: Series | None) -> float | None:
    """Tokens per second over the last few points."""
    if tokens is None or len(tokens.value) < 2:
        return None
    first = max(len(tokens.value) - 6, 0)
    seconds = tokens.time[-1] - tokens.time[first]
    return float((tokens.high[-1] - tokens.high[first]) / seconds) if seconds > 0 else None


def _last(curve: Mapping[str, Series]) -> float | None:
    losses = curve["loss"].value if "loss" in curve else ()
    known = [value for value in losses[-3:] if not np.isnan(value)]
    return float(known[-1]) if known else None


def last_loss(run: Run) -> float | None:
    """The newest training loss, if there is one."""
    return _brief(run.dir.metrics, *_stamp(run.dir.metrics))[0]


def spark(run: Run) -> list[float]:
    """The training loss in at most 32 points."""
    return list(_brief(run.dir.metrics, *_stamp(run.dir.metrics))[1])


def _stamp(path: Path) -> tuple[int, int]:
    try:
        told = path.stat()
    except FileNotFoundError:
        return 0, 0
    return told.st_mtime_ns, told.st_size


@lru_cache(maxsize=4096)
def _brief(path: Path, _changed: int, size: int) -> tuple[float | None, tuple[float, ...]]:
    """Last loss and spark line, kept as long as the file does not change."""
    if not size:
        return None, ()
    curve = _reader(path).read()
    if "loss" not in curve:
        return None, ()
    values = curve["loss"].value
    values = values[~np.isnan(values)]
    parts = np.array_split(values, min(32, len(values))) if len(values) else []
    return _last(curve), tuple(float(part.mean()) for part in parts)


def curves(run: Run) -> dict[str, Series]:
    """Every number the run logs, by name. Cheap to call again: only new lines are read."""
    return _reader(run.dir.metrics).read()


@lru_cache(maxsize=256)
def _reader(path: Path) -> _Reader:
    return _Reader(path)


class _Reader:
    """Follows one metrics file."""

    def __init__(self, path: Path):
        self.path, self.busy = path, threading.Lock()
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self.inode, self.offset = inode, 0
        self.growing: dict[str, _Growing] = {}

    def read(self) -> dict[str, Series]:
        with self.busy:
            try:
                with self.path.open("rb") as file:
                    told = os.fstat(file.fileno())
                    if told.st_ino != self.inode or told.st_size < self.offset:
                        self._begin(told.st_ino)
                    file.seek(self.offset)
                    while lines := self._whole_lines(file):
                        self._take(lines)
            except FileNotFoundError:
                self._begin(0)
            return {name: growing.series() for name, growing in self.growing.items()}

    def _whole_lines(self, file: Any) -> bytes:
        """The next lines up to about a chunk; nothing while the last line is still being written."""
        text = file.read(CHUNK)
        end = text.rfind(b"\n") + 1
        if not end:
            return b""
        file.seek(end - len(text), os.SEEK_CUR)
        self.offset += end
        return text[:end]

    def _take(self, text: bytes) -> None:
        try:
            lines = from_json(b"[" + b",".join(text.splitlines()) + b"]", allow_inf_nan=True)
        except ValueError:  # one of them is spoiled
            lines = [line for line in map(_object, text.splitlines()) if line]
        for name, points in _points(lines).items():
            self.growing.setdefault(name, _Growing()).add(points)


def _points(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Name → what the lines say of it, in their order: step, epoch, time, and the value as mean, lowest and highest.

    Lines of one kind (of training, of validation) have the same names in the same order, and are converted at once.
    """
    kinds: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for number, line in enumerate(lines):
        kinds.setdefault(tuple(line), []).append((number, *line.values()))
    parts: dict[str, list[np.ndarray]] = {}
    for names, rows in kinds.items():
        numbers, *columns = np.array(rows, dtype=np.float64).T  # null is NaN
        column = dict(zip(names, columns, strict=True))
        place = numbers, column["step"], np.nan_to_num(column["epoch"]), column["time"]
        for name in (one for one in names if one not in AXES):
            parts.setdefault(name, []).append(np.column_stack([*place, *[column[name]] * 3]))
    together = {name: np.concatenate(some) if len(some) > 1 else some[0] for name, some in parts.items()}
    return {name: table[np.argsort(table[:, 0], kind="stable"), 1:] for name, table in together.items()}


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = from_json(line, allow_inf_nan=True)
    except ValueError:
        return None
    return value if isinstance(value, dict) and set(AXES) <= set(value) else None


class _Growing:
    """A curve that keeps its shape in a bounded number of points. Columns: step, epoch, time, mean, low, high."""

    def __init__(self) -> None:
        self.merged = np.empty((0, 6))  # each of `stride` logged points
        self.fresh = np.empty((0, 6))  # not yet enough for one more
        self.stride = 1

    def add(self, points: np.ndarray) -> None:
        # A resumed run goes back to its checkpoint: what it logs from there replaces what stood there.
        steps = points[:, 0]
        later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
        points = points[steps < later]
        first = points[0, 0]
        self.merged = self.merged[self.merged[:, 0] < first]
        self.fresh = np.concatenate([self.fresh[self.fresh[:, 0] < first], points])
        self._merge()
        while len(self.merged) > 2 * POINTS:
            self.fresh = np.concatenate([self.merged[len(self.merged) // 2 * 2 :], self.fresh])
            self.merged, self.stride = _merged_by(self.merged, 2), self.stride * 2

    def _merge(self) -> None:
        whole = len(self.fresh) // self.stride * self.stride
        if whole:
            self.merged = np.concatenate([self.merged, _merged_by(self.fresh[:whole], self.stride)])
            self.fresh = self.fresh[whole:]

    def series(self) -> Series:
        table = np.concatenate([self.merged, self.fresh]) if self.stride > 1 else self.merged
        return Series(*(table[:, column] for column in range(6)))


def _merged_by(points: np.ndarray, by: int) -> np.ndarray:
    """Every `by` neighbours as one: the last one's place, their mean, lowest and highest."""
    groups = points[: len(points) // by * by].reshape(-1, by, 6)
    with np.errstate(all="ignore"):
        return np.concatenate(
            [
                groups[:, -1, :3],
                groups[:, :, 3:4].mean(1),
                groups[:, :, 4:5].min(1),
                groups[:, :, 5:6].max(1),
            ],
            axis=1,
        )


def log_tail(run: Run, lines: int = 200) -> str:
    """The last lines of the log. Of a line that a progress bar rewrote, the last state."""
    text = end_of(run.dir.log, 64 * 1024).decode("utf-8", errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(shown[-lines - 1 :]).strip("\n")
