"""What the supervisor of a run does about its owner's GPU hours: warn near their end, and at the end warn again or, if
the operator has chosen that, end the run: a training saves a checkpoint first."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from engine.core.problems import Problem, Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import read_object
from engine.runs import queue
from engine.runs.outcome import pause
from engine.runs.quotas import read_quotas
from engine.runs.run import Run

LOOK_SECONDS = 30.0
NEAR = 0.9  # the share of the hours from which on a warning is due


class QuotaWatch:
    """Looks at the GPU hours of a run's owner every half minute. Each warning is written once in an attempt."""

    def __init__(self, run: Run, clock: Callable[[], float] = time.time):
        self.run, self.clock, self.due = run, clock, 0.0
        self.saves, self.noted = queue.saves_of(run.path), set[str]()

    def look(self, saves: bool) -> None:
        """Warn, or request a stop, if it is time for that; `saves`: whether what is stopped then saves a checkpoint.
        Does nothing between two looks. Raises nothing: the run goes on."""
        if self.clock() < self.due:
            return
        self.due = self.clock() + LOOK_SECONDS
        try:
            self._look(saves)
        except Refusal:  # the file is wrong, as whoever submits the next run is told
            return
        except Exception:  # whatever is in a file of another run
            traceback.print_exc()

    def _look(self, saves: bool) -> None:
        quotas, user = read_quotas(self.saves), self.run.by
        limit = quotas.of(user).gpu_hours
        if limit is None:
            return
        from engine.runs.quota_use import hours_of  # supervisors without limits need not import it

        used = hours_of(self.saves, user, self.clock())
        values = {"user": user, "used": f"{used:,.1f}", "limit": f"{limit:g}"}
        if used < NEAR * limit:
            return
        if used < limit:
            ends = "quota-hours-stop-near" if self.run.kind == "training" else "quota-hours-end-near"
            self._note(problem(ends if quotas.stops else "quota-hours-near", **values))
        elif quotas.stops:
            pause(self.run.dir, again=False)
            self._note(problem("quota-hours-stopped" if saves else "quota-hours-ended", **values))
        else:
            self._note(problem("quota-hours-over", **values))

    def _note(self, warning: Problem) -> None:
        if warning.code not in self.noted:
            self.noted.add(warning.code)
            write_warning(self.run.dir, warning, int(read_object(self.run.dir.progress).get("done") or 0))
            print(warning.text(), flush=True)
