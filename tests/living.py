"""Who lives, and which runs' locks they hold, as /proc tells it, compared with what is said of the runs.

Nothing here asks engine: it is what is judged.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from engine.runs.run import ALIVE_STATES, FINAL_STATES, Run

LOOK_SECONDS = 0.05  # between two looks
LOOKS_PER_PAGE = 10  # looks at the folders for each look at the page
ORPHAN_SECONDS = 60.0  # that a process without the run's lock may take to follow the others


@dataclass(frozen=True)
class Living:
    """A process at one moment."""

    pid: int
    began: int  # clock ticks after the machine did
    words: tuple[str, ...]  # its command line; none while it ends: its memory goes first, what it has open later
    run: str  # the folder that the marker in its environment names, "" without one
    locks: frozenset[tuple[str, int]]  # of lock files: path and byte

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.began

    @property
    def supervises(self) -> bool:
        return "engine.runs.supervisor" in self.words

    def __str__(self) -> str:
        return f"{self.pid} ({' '.join(self.words[1:5])})"

    def holds(self, folder: Path, byte: int = 0) -> bool:
        return (f"{folder}/lock", byte) in self.locks


def living(mark: str) -> list[Living]:
    """Every process but this one with `mark` (NAME=value) in its environment, and any that ends and holds a lock."""
    processes = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                process = _read(Path("/proc", name), mark)
            except OSError:  # it has ended
                continue
            processes += [process] if process else []
    return processes


def _read(entry: Path, mark: str) -> Living | None:
    content = (entry / "environ").read_bytes()
    if content and mark.encode() not in content:  # as it is for nearly all
        return None
    environment = content.decode(errors="replace").split("\0")
    if mark not in environment and environment != [""]:
        return None
    run = next((pair.partition("=")[2] for pair in environment if pair.startswith("ATHANOR_RUN=")), "")
    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    began = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    locks = frozenset(_locks(entry))
    return Living(int(entry.name), began, tuple(words), run, locks) if words or locks else None


def _locks(entry: Path) -> Iterable[tuple[str, int]]:
    for descriptor in os.listdir(entry / "fd"):
        try:
            path = os.readlink(entry / "fd" / descriptor)
            if path.endswith("/lock"):
                for line in (entry / "fdinfo" / descriptor).read_text().splitlines():
                    if line.startswith("lock:"):
                        yield path, int(line.split()[-2])
        except OSError:  # closed meanwhile
            continue


@dataclass(frozen=True)
class Look:
    """What there is at one moment."""

    processes: list[Living]
    locked: frozenset[int]  # inodes of the files whose first byte is locked, by whomever

    def holders(self, folder: Path) -> dict[tuple[int, int], Living]:
        """Processes that hold the lock of the run in a folder."""
        return {process.identity: process for process in self.processes if process.holds(folder)}

    def is_held(self, folder: Path) -> bool:
        """Whether that lock is held, be it by a process that ends and shows nothing any more."""
        try:
            return bool(self.holders(folder)) or (folder / "lock").stat().st_ino in self.locked
        except FileNotFoundError:
            return False


def look(mark: str) -> Look:
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    # 1: OFDLCK ADVISORY READ -1 fe:00:2197124 0 0; with an arrow behind the number, it only waits for the lock.
    locked = frozenset(int(words[5].rpartition(":")[2]) for words in lines if words[1] == "OFDLCK" and words[6] == "0")
    return Look(living(mark), locked)


def contradictions(before: Look, runs: Iterable[Run], after: Look) -> list[str]:
    """What is said of the runs and cannot be so, by what there was before they were looked at and after."""
    faults, occupied = [], []
    for run in runs:
        later = after.holders(run.path)
        throughout = [process for identity, process in before.holders(run.path).items() if identity in later]
        # The supervisor writes the outcome while it holds the lock.
        others = [process for process in throughout if not run.exit or (process.words and not process.supervises)]
        if run.state in ALIVE_STATES and not before.is_held(run.path) and not after.is_held(run.path):
            faults.append(f"{run.id} is said to be {run.state}, and nobody holds its lock")
        if run.state not in ALIVE_STATES and others:
            names = ", ".join(map(str, others))
            faults.append(f"{run.id} is said to be {run.state}, and its lock is held by {names}")
        occupied += [run.id] if throughout else []
    return faults + ([f"{occupied} are alive at the same time"] if len(occupied) > 1 else [])


def false_result(run: Run) -> str:
    """What is wrong with the result of a run that is said to have finished; "" if nothing."""
    try:
        weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
        return "" if weights else f"{run.id} has finished with no weights"
    except Exception as error:  # whatever the library raises
        return f"{run.id} has finished, and its weights cannot be read: {error!r}"


class Watcher(threading.Thread):
    """Looks all the time, and keeps what is false in `faults`; `find` lists the runs, `show` asks what a page asks."""

    def __init__(self, mark: str, find: Callable[[], list[Run]], show: Callable[[list[Run]], object]):
        super().__init__(daemon=True)
        self.mark, self.find, self.show = mark, find, show
        self.faults: list[str] = []
        self.ended = threading.Event()
        self.looks = 0
        self.finished: set[str] = set()  # runs whose result has been read
        self.orphans: dict[tuple[str, int, int], float] = {}  # run and process → since when

    def run(self) -> None:
        while not self.ended.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:
                self.faults.append(traceback.format_exc())

    def look(self) -> None:
        self.looks += 1
        before = look(self.mark)
        runs = self.find()
        after = look(self.mark)
        self.faults += contradictions(before, runs, after)
        self.faults += filter(None, map(false_result, self._newly_finished(runs)))
        self._look_for_orphans(runs, after.processes)
        if self.looks % LOOKS_PER_PAGE == 0:
            self.show(runs)

    def _newly_finished(self, runs: list[Run]) -> list[Run]:
        new = [run for run in runs if run.state == "finished" and run.id not in self.finished]
        self.finished |= {run.id for run in new}
        return new

    def _look_for_orphans(self, runs: list[Run], processes: list[Living]) -> None:
        ended = {str(run.path): run.id for run in runs if run.state in FINAL_STATES}
        now, before = time.monotonic(), self.orphans
        left = {(process.run, *process.identity): process for process in processes if process.run in ended}
        self.orphans = {key: before.get(key, now) for key in left}
        for key, since in self.orphans.items():
            if now - since > ORPHAN_SECONDS:
                self.faults.append(f"{ended[key[0]]} has ended, and of it lives {left[key]}")

    def stop(self) -> None:
        self.ended.set()
        self.join(30)
