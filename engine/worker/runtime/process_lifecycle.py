"""The beginning and end of a child process: the lock is taken before anything slow, and errors are recorded."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from engine.core import leases
from engine.core.locks import try_lock
from engine.core.run_errors import write_error
from engine.core.rundir import ALIVE_BYTE, RunDir, write_json
from engine.launch.stacks import offer_stacks


def rank() -> int:
    """This process's rank among those of the run; 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def silence_warnings() -> None:
    """Keep library warnings that readers of the log cannot do anything about out of it."""
    warnings.simplefilter("ignore", FutureWarning)
    # The warning that an optional faster method for the CPU is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def library_imports() -> Iterator[None]:
    """Import libraries without the garbage collector, which would search the new objects again and again.

    torch and transformers create a million objects that live as long as the process, and nearly no garbage. The
    collector does not visit them afterwards either, which makes a full collection during training cheaper.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def run_lifecycle(folder: str) -> Iterator[RunDir]:
    """Hold the run's lock and the leases of its GPUs; leave error.json and exit code 1 behind on an error.

    The error of the first rank that fails is kept: the others fail because of its absence.
    """
    silence_warnings()
    run = RunDir(Path(folder))
    with contextlib.suppress(OSError):  # a file system of a cluster may have no locks; there, Slurm's word counts
        try_lock(run.lock, ALIVE_BYTE, shared=True)  # held until this process ends, for whatever reason
    offer_stacks()
    # At the end the system takes back all memory at once; searching it for garbage first would take most of a second.
    atexit.register(gc.freeze)
    try:
        leases.join()
        yield run
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(FileExistsError):
            write_error(run, error, rank())
        sys.exit(1)


class ProgressReport:
    """Reports what the run is doing in progress.json, at most twice a second."""

    def __init__(self, run: RunDir):
        self.run, self.due, self.last = run, 0.0, ""
        self.begun: dict[str, tuple[float, int]] = {}  # phase → when it first began, and how much was done then

    def __call__(self, phase: str, done: int = 0, total: int | None = None, unit: str = "", **details: int) -> None:
        if rank() or (phase == self.last and time.monotonic() < self.due and done != total):
            return
        self.last, self.due = phase, time.monotonic() + 0.5
        began, began_with = self.begun.setdefault(phase, (time.time(), done))
        progress = {
            "phase": phase,
            "done": done,
            "total": total,
            "unit": unit,
            "began": began,
            "began_with": began_with,
            "at": time.time(),
            **details,
        }
        with contextlib.suppress(OSError):  # a full disk is no reason to lose a training
            try:
                # Training does not wait for the disk twice a second, for what nobody needs after a power failure.
                write_json(self.run.progress, progress, durable=False)
            except OSError:
                self._overwrite(json.dumps(progress))

    def _overwrite(self, text: str) -> None:
        """Write into the existing file, because a full disk has no space for another: a run that waits for space must
        be able to say so."""
        with self.run.progress.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
