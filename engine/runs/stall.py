"""Notice a training that has stalled, and record it with the stacks of its processes; the run is not stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from engine.core.problems import problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import RunDir, read_object, stamp
from engine.launch.stacks import read_stacks

FIRST_STEP_FACTOR = 3  # how much longer loading, compiling and the first step of a phase may take


class StallWatch:
    """Watches whether a run still writes progress.json or metrics.jsonl. `minutes`: without them until it counts as
    stalled; 0 = never."""

    def __init__(self, run: RunDir, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.run, self.minutes, self.clock = run, minutes, clock
        self.seen, self.moved, self.noted = "", clock(), False

    def look(self) -> None:
        """Record it, once, if the run has stalled since its last progress."""
        now, seen = self.clock(), stamp([self.run.progress, self.run.metrics])
        if seen != self.seen:
            self.seen, self.moved, self.noted = seen, now, False
        elif self.minutes and not self.noted and now - self.moved > 60 * self.minutes:
            progress = read_object(self.run.progress)
            if now - self.moved > 60 * self.minutes * _patience(progress):
                self.noted = True
                self._note(progress.get("done", 0), (now - self.moved) / 60)

    def _note(self, step: int, minutes: float) -> None:
        warning = problem("run-stalled", "logging.stall_minutes", minutes=f"{minutes:.3g}", step=step)
        write_warning(self.run, warning, step)
        stacks = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {warning.text()}\n\n{read_stacks(self.run.path)}\n\n"
        with contextlib.suppress(OSError), self.run.stalled.open("a", encoding="utf-8") as file:
            file.write(stacks)
        with contextlib.suppress(OSError):
            print(warning.text(), flush=True)


def _patience(progress: dict[str, Any]) -> int:
    moves = progress.get("phase") in ("training", "evaluating", "judging") and progress.get("done") != progress.get(
        "began_with"
    )
    return 1 if moves else FIRST_STEP_FACTOR
