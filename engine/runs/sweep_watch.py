"""What the supervisor of a run in a sweep does: stop the run if it is hopeless, and all runs if the budget is used.

On Slurm, each supervisor stops its own run only: from the machine that it is on, it could stop others only under a lock
that may not be trusted there.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from engine.core.problems import Problem, problem
from engine.core.run_warnings import write_warning
from engine.runs import queue, sweeps
from engine.runs.outcome import pause
from engine.runs.run import Run, sweep_of

LOOK_SECONDS = 10.0


class SweepWatch:
    """Looks at the sweep of a run every few seconds, until it has stopped something.

    A run that was resumed is left alone: somebody wants it to go on.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.time):
        self.run, self.clock, self.due = run, clock, 0.0
        self.saves, self.sweep = queue.saves_of(run.path), sweep_of(run)
        self.done = run.request.get("attempt", 1) > 1

    def look(self) -> None:
        """Request a stop if it is time for that. Does nothing between two looks. Raises nothing: the run goes on."""
        if self.done or self.clock() < self.due:
            return
        self.due = self.clock() + LOOK_SECONDS
        try:
            self._look()
        except Exception:  # whatever is in a file of another run
            traceback.print_exc()

    def _look(self) -> None:
        members = sweeps.members(self.saves, self.sweep["id"])
        budget = self.sweep.get("budget_hours")
        if isinstance(budget, (int, float)) and sweeps.hours_used(members, self.clock()) >= budget:
            if self.run.dir.on_slurm():
                pause(self.run.dir, again=False)
            else:
                sweeps.stop(self.saves, self.sweep["id"])
            self._note(problem("sweep-budget", hours=f"{budget:g}"))
        elif self.sweep.get("early_stop"):
            self._stop_if_hopeless([run for run in members if run.path != self.run.path])

    def _stop_if_hopeless(self, others: list[Run]) -> None:
        own = sweeps.objective(self.run)
        verdict = own and sweeps.median_verdict(own, list(filter(None, map(sweeps.objective, others))))
        if own and verdict:
            step, value, median = verdict
            values = {"curve": own.name, "step": f"{step:g}", "value": f"{value:.4g}", "median": f"{median:.4g}"}
            pause(self.run.dir, again=False)
            self._note(problem("sweep-hopeless", **values))

    def _note(self, warning: Problem) -> None:
        self.done = True
        write_warning(self.run.dir, warning, 0)
        print(warning.text(), flush=True)
