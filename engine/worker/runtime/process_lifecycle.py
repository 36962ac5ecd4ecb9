"""Where a child process begins and ends: the lock is taken before anything slow, an error is written down."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE, RunDir, try_lock, write_json

MAX_CAUSES, MAX_CAUSE_CHARS = 20, 4000  # causes that are written down, and characters of each


def rank() -> int:
    """This process's rank among those of the run; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def silence_warnings() -> None:
    """Keep out of the log the warnings of libraries about which a reader of the log can do nothing."""
    warnings.simplefilter("ignore", FutureWarning)
    # That an optional faster way for the CPU is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def run_lifecycle(folder: str) -> Iterator[RunDir]:
    """Hold the run's lock; leave error.json and exit code 1 behind on an error.

    The first rank that fails is the one whose error is kept: the others fail of its absence.
    """
    silence_warnings()
    run = RunDir(Path(folder))
    try_lock(run.lock, ALIVE_BYTE, shared=True)  # held until this process ends, whatever ends it
    try:
        yield run
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(FileExistsError):
            _write_error(run, error)
        sys.exit(1)


def _write_error(run: RunDir, error: Exception) -> None:
    record = {
        "type": type(error).__name__, "message": str(error), "rank": rank(), "at": time.time(),
        "traceback": traceback.format_exc(), "causes": causes(error),
    }  # fmt: skip
    if isinstance(error, Refusal):
        # As codes and values, so that the page can say it in the reader's language.
        record["problems"] = [
            {
                "code": reason.code,
                "field": reason.field,
                "values": {k: str(v) for k, v in reason.values.items()},
            }
            for reason in error.problems
        ]
    with run.error.open("x", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, indent=1)


def causes(error: BaseException) -> list[str]:
    """What an error was raised from, or while handling, the nearest first: a library may wrap the reason in words about
    something else, and leave it out of the traceback (`raise … from None`)."""
    chain: list[BaseException] = []
    while (error := error.__cause__ or error.__context__) and error not in chain and len(chain) < MAX_CAUSES:
        chain.append(error)
    return [f"{type(cause).__name__}: {cause}"[:MAX_CAUSE_CHARS] for cause in chain]


class ProgressReport:
    """Tells what the run is doing, in progress.json; at most twice a second, since a disk is no screen."""

    def __init__(self, run: RunDir):
        self.run, self.due, self.last = run, 0.0, ""
        self.begun: dict[
            str, tuple[float, int]
        ] = {}  # phase → when it first began, and how much was done then

    def __call__(self, phase: str, done: int = 0, total: int | None = None, unit: str = "") -> None:
        if rank() or (phase == self.last and time.monotonic() < self.due and done != total):
            return
        self.last, self.due = phase, time.monotonic() + 0.5
        began, began_with = self.begun.setdefault(phase, (time.time(), done))
        progress = {
            "phase": phase, "done": done, "total": total, "unit": unit, "began": began, "began_with": began_with,
            "at": time.time(),
        }  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk is no reason to lose a training
            write_json(self.run.progress, progress)
