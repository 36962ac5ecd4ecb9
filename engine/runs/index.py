"""The list of runs, within milliseconds for ten thousand of them.

A run that has ended changes only by resume or deletion, so what was read of it is kept: in memory, and in a file of the
saves folder for the next process. The folders remain the truth. Each listing checks whether a run's folder has changed,
and once in a while whether one of its files has; the index can be deleted at any time and is then rebuilt.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

from engine.core.regular_files import modification_times
from engine.core.rundir import read_object, scan_methods, stamp, write_text
from engine.runs.facts import RunFacts
from engine.runs.run import Run, read_with_end

FILE = ".runs.json"  # inside the saves folder
VERSION = 1  # of the file; raised together with RunFacts
RECHECK_SECONDS = 30.0  # after which a run's files are also checked: only people edit them in place
SETTLED_SECONDS = 2.0  # a folder changed since then may change again within the same tick of the file system's clock
NEVER = -math.inf  # when a run was last compared that was read from the file
WRITE_AFTER_RUNS = 200  # number of newly read runs after which the file is written


@dataclass(frozen=True)
class _Entry:
    """A run that has ended: when its folder was changed (ns), the stamp of its files, and when that was last
    compared."""

    changed: int
    stamp: str
    checked: float
    run: Run


class RunIndex:
    """The runs of one saves folder. Thread-safe: while it is being read, other callers wait for that result."""

    def __init__(self, saves: Path):
        self.saves, self.busy = saves, threading.Lock()
        # By the start of their ids (model/method), then by the names of their folders; None before the file was read.
        self.entries: dict[str, dict[str, _Entry]] | None = None
        self.unwritten = 0

    def look(self) -> tuple[list[Run], list[Run]]:
        """All runs in their current state, in no order: those known to have ended, and all others."""
        with self.busy:
            before = self.entries if self.entries is not None else self._load()
            ended: list[Run] = []
            others: list[Run] = []
            self.entries = {}
            for method, path in scan_methods(self.saves):
                known = before.get(method, {})
                now = time.monotonic()
                overdue = now - RECHECK_SECONDS
                times = dict(modification_times(path))
                # Whole dictionaries at a time: what is done for each of ten thousand runs is most of a look.
                kept = {name: entry for name, entry in known.items() if times.get(name) == entry.changed}
                for name in [name for name, entry in kept.items() if entry.checked <= overdue]:
                    if entry := _compared(kept.pop(name), now):
                        kept[name] = entry
                ended += [entry.run for entry in kept.values()]
                for name in times.keys() - kept.keys():
                    run, has_ended = self._read(f"{path}/{name}")
                    if run and run.request:
                        others.append(run)
                        if has_ended and (new := self._entry(run, times[name])):
                            kept[name] = new
                self.entries[method] = kept
            if self.unwritten >= WRITE_AFTER_RUNS:
                self._write(self.entries)
            return ended, others

    def _read(self, folder: str) -> tuple[Run | None, bool]:
        """The run in a folder, and whether it has ended for good; None if it no longer exists, or cannot be accessed,
        so that it hides no other run."""
        try:
            return read_with_end(Path(folder), self.saves)
        except OSError:
            return None, False

    def _entry(self, run: Run, changed: int) -> _Entry | None:
        """What to remember of a run that has ended, unless its folder has just changed."""
        if time.time_ns() - changed <= SETTLED_SECONDS * 1e9:
            return None
        before = _stamp(str(run.path))
        run.facts  # noqa: B018  # read after the stamp: what changes meanwhile is seen when files are compared
        self.unwritten += 1
        return _Entry(changed, before, time.monotonic() - _spread(run.id), run)

    def _load(self) -> dict[str, dict[str, _Entry]]:
        written = read_object(self.saves / FILE)
        if written.get("version") != VERSION:
            return {}
        try:
            entries: dict[str, dict[str, _Entry]] = {}
            for id, entry in self._entries(written["runs"]):
                method, _, name = id.rpartition("/")
                entries.setdefault(method, {})[name] = entry
            return entries
        except (TypeError, ValueError, LookupError, AttributeError):  # damaged: it is rebuilt
            return {}

    def _entries(self, written: dict[str, Any]) -> Iterator[tuple[str, _Entry]]:
        for id, (changed, files, state, request, exit, facts) in written.items():
            if not isinstance(request["submitted"], (int, float)) or not isinstance(exit["outcome"], str):
                raise TypeError("no entry of an index")
            known = RunFacts(**facts | {"data": tuple(facts["data"])})
            run = Run(id, self.saves / id, state, request, exit, known)
            yield id, _Entry(changed, files, NEVER, run)  # compared before it is used

    def _write(self, entries: dict[str, dict[str, _Entry]]) -> None:
        """Write the file atomically."""
        written = {
            entry.run.id: (
                entry.changed,
                entry.stamp,
                entry.run.state,
                entry.run.request,
                entry.run.exit,
                asdict(entry.run.facts),
            )
            for known in entries.values()
            for entry in known.values()
        }
        with contextlib.suppress(OSError):  # then each process reads the folders again
            write_text(self.saves / FILE, json.dumps({"version": VERSION, "runs": written}), durable=False)
        self.unwritten = 0


def _stamp(folder: str) -> str:
    return stamp(f"{folder}/{name}" for name in ("request.json", "exit.json", "spec.yaml", "metrics.jsonl"))


def _compared(entry: _Entry, now: float) -> _Entry | None:
    """The entry as of now; None if one of the run's files has changed."""
    if _stamp(str(entry.run.path)) != entry.stamp:
        return None
    checked = now - _spread(entry.run.id) if entry.checked == NEVER else now
    return _Entry(entry.changed, entry.stamp, checked, entry.run)


def _spread(id: str) -> float:
    """By how much sooner a run is compared for the first time (s), so that ten thousand are not due in one look."""
    return crc32(id.encode()) % 1000 / 1000 * RECHECK_SECONDS


@lru_cache(maxsize=16)
def _index(saves: Path) -> RunIndex:
    return RunIndex(saves)


def runs(saves: Path) -> list[Run]:
    """Every run in `saves`, in no order."""
    ended, others = _index(saves).look()
    return ended + others


def open_runs(saves: Path) -> list[Run]:
    """The runs that are waiting or alive, and perhaps some that have just ended."""
    return _index(saves).look()[1]
