"""How a sweep stands: its runs, which of them is best, and how much of its budget is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.core.problems import NOTHING, Problem, problem, say
from engine.core.rundir import stamp
from engine.core.stages import STAGES
from engine.runs import attempts, index, spent_hours
from engine.runs.facts import newest_value
from engine.runs.run import Run, sweep_of


@dataclass(frozen=True)
class Budget:
    """GPU hours of a sweep: those that it has, None without a limit, and those that its runs have used, with the ones
    that were deleted; on the CPU, a process counts as a GPU."""

    hours: float | None
    used: float

    @property
    def is_used_up(self) -> bool:
        return self.hours is not None and self.used >= self.hours

    @property
    def warning(self) -> Problem:
        """Why the runs are stopped once it is used up."""
        return problem("sweep-budget", hours=NOTHING if self.hours is None else f"{self.hours:g}")


@dataclass(frozen=True)
class Measure:
    """The newest value of the curve by which a run is compared with the others of its sweep."""

    curve: str
    value: float

    @property
    def cost(self) -> float:
        """The lower, the better."""
        return sign(self.curve) * self.value


def members(saves: Path, id: str) -> list[Run]:
    """The runs of a sweep, in the order in which they were submitted."""
    own = (run for run in index.runs(saves) if run.kind == "training" and sweep_of(run).get("id") == id)
    return sorted(own, key=lambda run: run.submitted)


def sweep_with(run: Run, saves: Path) -> list[Run]:
    """The runs of the sweep to which a run belongs; empty if it belongs to none."""
    id = sweep_of(run).get("id")
    return members(saves, id) if id else []


def budget_of(saves: Path, id: str, now: float) -> Budget:
    """The budget of a sweep; `now` in seconds since 1970."""
    return budget(saves, members(saves, id), now)


def budget(saves: Path, sweep: Sequence[Run], now: float) -> Budget:
    """The same of a sweep with these runs."""
    if not sweep:
        return Budget(None, 0.0)
    about = sweep_of(sweep[0])
    hours = about.get("budget_hours")
    deleted = spent_hours.hours_of_sweep(saves, about["id"], {run.id for run in sweep})
    used = sum(attempts.gpu_hours(run, now) for run in sweep) + deleted
    return Budget(hours if isinstance(hours, (int, float)) else None, used)


def hours_text(hours: float) -> str:
    """GPU hours that were used, to three digits."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def summary(saves: Path, sweep: Sequence[Run], now: float, language: str) -> str:
    """How the sweep with these runs stands, in one sentence; `now` as for `budget`."""
    used, best = budget(saves, sweep, now), best_of(sweep)
    reached = measure(best) if best else None
    values = {
        "count": len(sweep),
        "ended": sum(run.final for run in sweep),
        "used": hours_text(used.used),
        "hours": NOTHING if used.hours is None else f"{used.hours:g}",
        "best": f"{best.id} ({reached.curve} {reached.value:.4g})" if best and reached else NOTHING,
    }
    return say("sweep-standing", language, **values)


# ------------------------------------------------------------------------------------------ which is best


def curves_to_compare(stage: str) -> list[str]:
    """The names of the curves by which runs of a stage are compared, the first that there is: the validation metric
    that identifies the best checkpoint, or the stage's main curve."""
    known = STAGES.get(stage)
    return [f"eval_{known.best}", known.tells] if known else []


def sign(curve: str) -> int:
    """1 if lower values of a curve are better, -1 if higher ones are."""
    return 1 if curve.endswith("loss") else -1


def measure(run: Run) -> Measure | None:
    """None if the run has logged none of the curves."""
    return _measure(run.dir.metrics, run.facts.stage, stamp([run.dir.metrics]))


@lru_cache(maxsize=4096)
def _measure(metrics: Path, stage: str, _stamp: str) -> Measure | None:
    measured = ((name, newest_value(metrics, name)) for name in curves_to_compare(stage))
    return next((Measure(name, value) for name, value in measured if value is not None), None)


def ranked(sweep: Sequence[Run]) -> list[Run]:
    """The runs by their measures, the best first; those that cannot be compared with most of the others, because they
    have no measure or another one, are last."""
    measures = {run.id: own for run in sweep if (own := measure(run))}
    if not measures:
        return list(sweep)
    [(usual, _)] = Counter(own.curve for own in measures.values()).most_common(1)
    costs = {id: own.cost for id, own in measures.items() if own.curve == usual}
    return sorted(sweep, key=lambda run: (run.id not in costs, costs.get(run.id, 0.0)))


def best_of(sweep: Sequence[Run]) -> Run | None:
    """The best of the runs that have finished; None if none of them can be measured."""
    best = next(iter(ranked([run for run in sweep if run.state == "finished"])), None)
    return best if best and measure(best) else None


def best_among(runs: Sequence[Run], shown: Sequence[Run]) -> set[str]:
    """The ids of the best runs of all sweeps of several runs of which one is `shown`; `runs` are all runs."""
    by_sweep: dict[str, list[Run]] = {id: [] for run in shown if (id := sweep_of(run).get("id"))}
    for run in runs if by_sweep else ():
        if run.kind == "training" and (id := sweep_of(run).get("id")) in by_sweep:
            by_sweep[id].append(run)
    return {best.id for sweep in by_sweep.values() if len(sweep) > 1 and (best := best_of(sweep))}
