"""Where a child process begins and ends: the lock is taken before anything slow, an error is written down."""

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

from engine.core.run_errors import write_error
from engine.core.rundir import ALIVE_BYTE, RunDir, try_lock, write_json
from engine.launch.stacks import offer_stacks


def rank() -> int:
    """This process's rank among those of the run; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def silence_warnings() -> None:
    """Keep out of the log the warnings of libraries about which a reader of the log can do nothing."""
    warnings.simplefilter("ignore", FutureWarning)
    # That an optional faster way for the CPU is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def library_imports() -> Iterator[None]:
    """Import libraries without the garbage collector, which would search what they make again and again.

    torch and transformers make a million objects that stay as long as the process, and nearly no garbage. The collector
    never looks at them afterwards either: a full collection while training costs the less.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def run_lifecycle(folder: str) -> Iterator[RunDir]:
    """Hold the run's lock; leave error.json and exit code 1 behind on an error.

    The first rank that fails is the one whose error is kept: the others fail of its absence.
    """
    silence_warnings()
    run = RunDir(Path(folder))
    try_lock(run.lock, ALIVE_BYTE, shared=True)  # held until this process ends, whatever ends it
    offer_stacks()
    # At the end the system takes all memory back at once; to search it for garbage first takes most of a second.
    atexit.register(gc.freeze)
    try:
        yield run
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(FileExistsError):
            write_error(run, error, rank())
        sys.exit(1)


class ProgressReport:
    """Tells what the run is doing, in progress.json; at most twice a second, since a disk is no screen."""

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
                write_json(self.run.progress, progress)
            except OSError:
                self._overwrite(json.dumps(progress))

    def _overwrite(self, text: str) -> None:
        """Write into the file that is there, since a disk that is full has no
        space for another: a run that waits for space must be able to say so."""
        with self.run.progress.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
