"""What the supervisor of a run in a sweep does: stop the run if it is hopeless, and all runs if the budget is used.

On Slurm, each supervisor stops its own run only: from the machine that it is on, it could stop others only under a lock
that may not be trusted there.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.core.problems import Problem, problem
from engine.core.run_warnings import write_warning
from engine.runs import queue, sweep_standing, sweeps
from engine.runs.outcome import pause
from engine.runs.run import Run, sweep_of

LOOK_SECONDS = 10.0


class SweepWatch:
    """Looks at the sweep of a run every few seconds, until it has stopped something.

    A run that was resumed is not judged: somebody wants it to go on. It counts towards the budget, and is stopped with
    the others, unless the budget was used up when it was resumed (`resumption.request_fields`).
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.time):
        self.run, self.clock, self.due = run, clock, 0.0
        self.saves, self.sweep = queue.saves_of(run.path), sweep_of(run)
        self.judged = bool(self.sweep.get("early_stop")) and run.request.get("attempt", 1) == 1
        self.done = False

    def look(self) -> None:
        """Request a stop if it is time for that. Does nothing between two looks. Raises nothing: the run goes on."""
        if self.done or self.clock() < self.due:
            return
        self.due = self.clock() + LOOK_SECONDS
        try:
            self.done = self._stop_without_budget() or self._stop_if_hopeless()
        except Exception:  # whatever is in a file of another run
            traceback.print_exc()

    def _stop_without_budget(self) -> bool:
        """Whether the run is stopped, or another."""
        if not self.sweep.get("budget_hours"):
            return False
        if not self.run.dir.on_slurm():
            return stop_without_budget(self.saves, self.sweep["id"], self.clock())
        budget = sweep_standing.budget_of(self.saves, self.sweep["id"], self.clock())
        if _is_beyond(self.run) or not budget.is_used_up:
            return False
        pause(self.run.dir, again=False)
        _say([self.run], budget.warning)
        return True

    def _stop_if_hopeless(self) -> bool:
        """Whether the run is stopped."""
        own = sweeps.objective(self.run) if self.judged else None
        if own is None:
            return False
        members = sweep_standing.members(self.saves, self.sweep["id"])
        others = [sweeps.objective(run) for run in members if run.path != self.run.path]
        verdict = sweeps.median_verdict(own, list(filter(None, others)))
        if verdict is None:
            return False
        step, value, median = verdict
        pause(self.run.dir, again=False)
        values = {"curve": own.name, "step": f"{step:g}", "value": f"{value:.4g}", "median": f"{median:.4g}"}
        _say([self.run], problem("sweep-hopeless", **values))
        return True


def stop_without_budget(saves: Path, id: str, now: float) -> bool:
    """Stop all runs of a sweep if its budget is used up at `now`, in seconds since 1970, and let each say why; not
    those that somebody has resumed beyond it. Whether there were any. Raises nothing: other runs wait for the
    caller."""
    try:
        budget = sweep_standing.budget_of(saves, id, now)
        stopped = sweeps.stop(saves, id, spared=_is_beyond) if budget.is_used_up else []
        _say(stopped, budget.warning)
    except Exception:  # whatever is in a file of another run
        traceback.print_exc()
        return False
    return bool(stopped)


def _is_beyond(run: Run) -> bool:
    return bool(run.request.get("beyond_budget"))


def _say(stopped: Sequence[Run], why: Problem) -> None:
    """Let the pages of runs say why they are stopped, and the log of this one."""
    for run in stopped:
        write_warning(run.dir, why, 0)
    if stopped:
        print(why.text(), flush=True)
