"""The list of runs, within milliseconds for ten thousand of them.

A run that has ended changes only by resume or deletion, so what was read of it is kept: in memory, and in a file of the
saves folder for the next process. The folders remain the truth. Each listing checks whether a run's folder has changed,
and once in a while whether one of its files has; the index can be deleted at any time and is then rebuilt.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core.rundir import read_object, scan_runs, stamp, write_text
from engine.runs.facts import RunFacts
from engine.runs.run import Run, has_ended, read

FILE = ".runs.json"  # inside the saves folder
VERSION = 1  # of the file; raised together with RunFacts
RECHECK_SECONDS = 30.0  # after which a run's files are also checked: only people edit them in place
SETTLED_SECONDS = 2.0  # a folder changed since then may change again within the same tick of the file system's clock
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
        self.entries: dict[str, _Entry] | None = None  # None before the file has been read
        self.unwritten = 0

    def look(self) -> tuple[list[Run], list[Run]]:
        """All runs in their current state, in no order: those known to have ended, and all others."""
        with self.busy:
            before = self.entries if self.entries is not None else self._load()
            ended: list[Run] = []
            others: list[Run] = []
            self.entries = entries = {}
            for id, folder, changed in scan_runs(self.saves):
                if entry := _still_true(before.get(id), folder, changed):
                    entries[id] = entry
                    ended.append(entry.run)
                elif (run := self._read(folder)) and run.request:
                    others.append(run)
                    self._keep(run, changed, entries)
            if self.unwritten >= WRITE_AFTER_RUNS:
                self._write(entries)
            return ended, others

    def _read(self, folder: str) -> Run | None:
        """The run in a folder; None if it no longer exists, or cannot be accessed, so that it hides no other run."""
        try:
            return read(Path(folder), self.saves)
        except OSError:
            return None

    def _keep(self, run: Run, changed: int, entries: dict[str, _Entry]) -> None:
        settled = time.time_ns() - changed > SETTLED_SECONDS * 1e9
        if settled and has_ended(run):
            before = _stamp(str(run.path))
            run.facts  # noqa: B018  # read now, between two looks at the stamp
            if _stamp(str(run.path)) == before:
                entries[run.id] = _Entry(changed, before, time.monotonic(), run)
                self.unwritten += 1

    def _load(self) -> dict[str, _Entry]:
        written = read_object(self.saves / FILE)
        if written.get("version") != VERSION:
            return {}
        try:
            return dict(self._entries(written["runs"]))
        except (TypeError, ValueError, LookupError, AttributeError):  # damaged: it is rebuilt
            return {}

    def _entries(self, written: dict[str, Any]) -> Iterator[tuple[str, _Entry]]:
        for id, (changed, files, state, request, exit, facts) in written.items():
            if not isinstance(request["submitted"], (int, float)) or not isinstance(exit["outcome"], str):
                raise TypeError("no entry of an index")
            known = RunFacts(**facts | {"data": tuple(facts["data"])})
            run = Run(id, self.saves / id, state, request, exit, known)
            yield id, _Entry(changed, files, -RECHECK_SECONDS, run)  # compared before it is used

    def _write(self, entries: dict[str, _Entry]) -> None:
        """Write the file atomically."""
        written = {
            id: (
                entry.changed,
                entry.stamp,
                entry.run.state,
                entry.run.request,
                entry.run.exit,
                asdict(entry.run.facts),
            )
            for id, entry in entries.items()
        }
        with contextlib.suppress(OSError):  # then each process reads the folders again
            write_text(self.saves / FILE, json.dumps({"version": VERSION, "runs": written}), durable=False)
        self.unwritten = 0


def _stamp(folder: str) -> str:
    return stamp(f"{folder}/{name}" for name in ("request.json", "exit.json", "spec.yaml", "metrics.jsonl"))


def _still_true(entry: _Entry | None, folder: str, changed: int) -> _Entry | None:
    if entry is None or entry.changed != changed:
        return None
    now = time.monotonic()
    if now - entry.checked < RECHECK_SECONDS:
        return entry
    return _Entry(changed, entry.stamp, now, entry.run) if _stamp(folder) == entry.stamp else None


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
