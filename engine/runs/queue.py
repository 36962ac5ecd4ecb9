"""Who runs next. A durable queue in first-come order: it is the set of run folders that have not started.

One lane for now: a run starts when no other is alive. Everything that has reason to (a studio's tick, a supervisor that
ends, a shell command) calls `advance`; the queue's own lock lets one do so at a time, so two studios on one
saves folder never start a run twice. With a lane for each device, this is the place for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from engine.core.rundir import RunDir, any_run_alive, read_object, run_folders, wait_for_lock, write_json
from engine.launch import command
from engine.launch.workspace import PROJECT


def saves_of(folder: Path) -> Path:
    """The saves folder that a run lies in."""
    return folder.parents[2]


@contextlib.contextmanager
def locked(saves: Path) -> Iterator[None]:
    """Nobody else starts, resumes or deletes a run meanwhile."""
    lock = wait_for_lock(saves / ".queue.lock")
    try:
        yield
    finally:
        os.close(lock)


def waiting(saves: Path) -> list[Path]:
    """Runs that have not started, in the order in which they will."""
    queued = []
    for folder in run_folders(saves):
        run = RunDir(folder)
        if not run.exit.exists() and not run.keeper.exists() and not run.alive():
            request = read_object(run.request)  # {} if it has been deleted meanwhile, or is damaged
            since = request.get("queued", 0)
            if isinstance(request.get("submitted"), (int, float)) and isinstance(since, (int, float)):
                queued.append((since, folder))
    return [folder for _, folder in sorted(queued)]


def advance(saves: Path) -> None:
    """Start the first waiting run if the lane is free."""
    with locked(saves):
        # The longest-waiting run that cannot even get a supervisor is put aside, and the next one has its turn.
        for folder in waiting(saves):
            if any_run_alive(saves):
                return
            if _start(folder):
                return


def _start(folder: Path) -> bool:
    arguments = [sys.executable, "-m", "engine.runs.supervisor", "keep", str(folder)]
    environment = command.inherited_environment() | {"PYTHONPATH": command.python_path(), "PYTHONUTF8": "1"}
    done = subprocess.run(
        arguments, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        run = RunDir(folder)
        with run.log.open("ab") as log:
            log.write(done.stderr)
        give_up(run, done.returncode)
    return done.returncode == 0


def give_up(run: RunDir, code: int) -> None:
    """Put a run aside that could not be supervised, so that it does not stand at the head of the queue for ever."""
    write_json(run.exit, {
        "outcome": "failed", "reason": "no-keeper", "code": code, "signal": None, "ended": time.time(),
        "attempt": run.attempt(), "peak_memory": 0,
    })  # fmt: skip
