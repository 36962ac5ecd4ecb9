"""Which run starts next. A durable first-come queue: it consists of the run folders that have not started.

There is one lane for now: a run starts when no other is alive. Everything that may have to start one (a studio's tick,
a supervisor that ends, a shell command) calls `advance`. The queue's own lock lets only one caller do so at a time, so
two studios on one saves folder never start a run twice. If there is ever a lane per device, it belongs here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.core import regular_files
from engine.core.rundir import SUPERVISED_BYTE, RunDir, is_locked, wait_for_lock, write_json
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.runs import index
from engine.runs.run import Run


def saves_of(folder: Path) -> Path:
    """The saves folder that contains a run."""
    return folder.parents[2]


@contextlib.contextmanager
def locked(saves: Path) -> Iterator[int]:
    """Lock the queue: nobody else starts, resumes or deletes a run meanwhile, nor while a child has the descriptor of
    the lock."""
    lock = wait_for_lock(saves / ".queue.lock")
    try:
        yield lock
    finally:
        os.close(lock)


def waiting(saves: Path) -> list[Path]:
    """Runs that have not started, in the order in which they will."""
    return _waiting(index.open_runs(saves))


def _waiting(open_runs: Iterable[Run]) -> list[Path]:
    queued = []
    for run in open_runs:
        since = run.request.get("queued", 0)
        if run.state == "queued" and not run.request.get("damaged") and isinstance(since, (int, float)):
            queued.append((since, run.path))
    return [folder for _, folder in sorted(queued)]


def is_occupied(saves: Path) -> bool:
    """Whether a run is alive."""
    return _any_alive(index.open_runs(saves))


def is_busy(saves: Path) -> bool:
    """Whether a run is alive or waiting to start."""
    open_runs = index.open_runs(saves)
    return bool(_waiting(open_runs)) or _any_alive(open_runs)  # in this order: one that waits may start meanwhile


def _any_alive(open_runs: Iterable[Run]) -> bool:
    return any(run.dir.alive() for run in open_runs)


def position(run: Run) -> int | None:
    """1 for the run that is alive, 2 for the first one waiting behind it; None if it is not waiting."""
    if run.state != "queued":
        return None
    order = waiting(saves_of(run.path))
    return order.index(run.path) + 2 if run.path in order else None  # it may have started in the meantime


def advance(saves: Path, hand_over: Callable[[RunDir, int], bool] = lambda run, lock: False) -> None:
    """Start the first waiting run if the lane is free. `hand_over` may give it to a supervisor that exists already:
    (run, descriptor of the queue's lock) → whether the run has a supervisor."""
    with locked(saves) as lock:
        open_runs = index.open_runs(saves)
        # If the longest-waiting run cannot get a supervisor, it is put aside, and the next one has its turn.
        for folder in _waiting(open_runs):
            if _any_alive(open_runs):
                return
            if hand_over(RunDir(folder), lock) or _start(RunDir(folder), lock):
                return


def supervisor_command(folder: Path | str) -> list[str]:
    """The command that starts the supervisor of a run, and returns once it holds the run's lock."""
    return [sys.executable, "-m", "engine.runs.supervisor", "keep", str(folder)]


def supervisor_environment() -> dict[str, str]:
    """The environment of a supervisor."""
    return command.inherited_environment() | {"PYTHONPATH": command.python_path(), "PYTHONUTF8": "1"}


def _start(run: RunDir, lock: int) -> bool:
    """Whether the run has a supervisor from now on.

    The supervisor's standard input is the lock of the queue, until it holds the run's: if this process is killed in
    between, nobody considers the run as still waiting.
    """
    done = subprocess.run(
        supervisor_command(run.path),
        cwd=PROJECT,
        env=supervisor_environment(),
        stdin=lock,
        capture_output=True,
        check=False,
    )
    # If it was killed after the supervisor had forked, the supervisor was started all the same.
    if done.returncode == 0 or is_locked(run.lock, SUPERVISED_BYTE):
        return True
    with contextlib.suppress(OSError), regular_files.append_to_regular(run.log) as log:
        log.write(done.stderr)
    give_up(run, done.returncode)
    return False


def give_up(run: RunDir, code: int, reason: str = "no-keeper") -> None:
    """Put a run aside that could not be supervised, so that it does not block the queue forever."""
    write_json(
        run.exit,
        {
            "outcome": "failed",
            "reason": reason,
            "code": code,
            "signal": None,
            "ended": time.time(),
            "attempt": run.attempt(),
            "peak_memory": 0,
        },
    )
