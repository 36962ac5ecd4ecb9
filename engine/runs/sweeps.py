"""Sweeps: several trainings that differ in a few settings, submitted, stopped and judged together.

Each is a run like any other; its request names the sweep. Nothing else holds the sweep together, so its runs can be
resumed, moved or deleted one by one.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from engine.core.problems import Problem, Refusal, problem
from engine.launch.workspace import Workplace
from engine.runs import engines, progress, runs, standby
from engine.runs.run import Run
from engine.runs.sweep_standing import curves_to_compare, members, sign
from engine.spec.run_spec import MAX_NAME_LENGTH, RunSpec, fields

Order = Literal["grid", "random", "list"]
ORDERS = get_args(Order)
MAX_RUNS = 200
MAX_PROBLEMS = 20
LEAST_OTHERS, LEAST_POINTS = 3, 4  # of other runs, and of values of the run itself, before it is judged
FIXED = ("name", "data.dataset_dir", "hardware.devices", "data.datasets")  # settings that do not vary in a sweep


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: the values that it has of the varied settings, and its whole spec."""

    values: Mapping[str, str]
    spec: RunSpec


def settings() -> list[str]:
    """The settings that can vary, by path: those with a single value."""
    return [path for path, info in fields().items() if path not in FIXED and "list[" not in str(info.annotation)]


def read_axes(lines: Sequence[str]) -> dict[str, list[str]]:
    """Settings and their values from lines such as `training.learning_rate = 1e-4, 2e-4`. Raises Refusal."""
    axes: dict[str, list[str]] = {}
    for line in filter(None, (line.strip() for line in lines)):
        path, equals, values = line.partition("=")
        path = path.strip()
        if not equals or path not in settings():
            raise Refusal(problem("sweep-setting", "sweep", line=line))
        if path in axes:
            raise Refusal(problem("sweep-twice", "sweep"))
        axes[path] = [value.strip() for value in values.split(",") if value.strip()]
    return axes


def combinations(
    axes: Mapping[str, Sequence[str]], order: str, count: int | None = None, seed: int = 0
) -> list[dict[str, str]]:
    """The values that each run of a sweep has, by setting. "grid": every combination; "random": `count` different ones
    of these, drawn with the seed; "list": the first values of all settings, then the second ones, and so on. Raises
    Refusal."""
    if order not in ORDERS:
        raise Refusal(problem("spec-choice", "sweep", given=order, choices=", ".join(ORDERS)))
    lengths = [len(values) for values in axes.values()]
    if not lengths or not all(lengths) or (count is not None and count < 1):
        raise Refusal(problem("sweep-empty", "sweep"))
    if order == "list" and len(set(lengths)) > 1:
        raise Refusal(problem("sweep-uneven", "sweep", lengths=", ".join(map(str, lengths))))
    total = lengths[0] if order == "list" else math.prod(lengths)
    chosen = min(count or total, total) if order == "random" else total
    if chosen > MAX_RUNS:
        raise Refusal(problem("sweep-too-many", "sweep", count=f"{chosen:,}", most=MAX_RUNS))
    places = random.Random(seed).sample(range(total), chosen) if order == "random" else range(chosen)
    return [_values(axes, place, order) for place in places]


def variants(base: RunSpec, axes: Mapping[str, Sequence[str]], order: str, count: int | None = None) -> list[Variant]:
    """The runs of a sweep: see `combinations`, with the seed of the training. Raises Refusal, also for an invalid
    value."""
    return [_variant(base, values) for values in combinations(axes, order, count, base.training.seed)]


def _values(axes: Mapping[str, Sequence[str]], place: int, order: str) -> dict[str, str]:
    """The combination with this number: in a grid, the last setting changes fastest."""
    if order == "list":
        return {path: values[place] for path, values in axes.items()}
    chosen = {}
    for path, values in reversed(list(axes.items())):
        place, at = divmod(place, len(values))
        chosen[path] = values[at]
    return dict(reversed(chosen.items()))


def _variant(base: RunSpec, values: Mapping[str, str]) -> Variant:
    spec = base
    for path, value in values.items():
        spec = spec.change(path, value)
    label = " ".join(f"{path.rpartition('.')[2]}={value}" for path, value in values.items())
    return Variant(values, spec.change("name", " ".join(filter(None, (base.name, label)))[:MAX_NAME_LENGTH]))


def submit(
    sweep: Sequence[Variant],
    workplace: Workplace,
    *,
    by: str = "",
    budget_hours: float | None = None,
    early_stop: bool = False,
) -> list[Run]:
    """Submit all runs of a sweep, or none. `budget_hours`: GPU hours, or processor hours of runs on the CPU, of all
    runs together, after which those that are left are stopped. Raises Refusal with the problems of the first run that
    has any."""
    if budget_hours is not None and not 0 < budget_hours < math.inf:
        raise Refusal(problem("sweep-budget-number", "sweep", given=budget_hours))
    for variant in sweep:
        kind = runs.kinds.KINDS[RunSpec.kind]
        if obstacles := kind.problems(kind.frozen(variant.spec, workplace), workplace):
            raise Refusal([_in_run(variant, obstacle) for obstacle in obstacles[:MAX_PROBLEMS]])
    id = f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{time.time_ns() % 10**6:06}"
    extra = {"id": id, "budget_hours": budget_hours, "early_stop": early_stop}
    submitted: list[Run] = []
    try:
        for variant in sweep:
            request = {"sweep": extra | {"values": dict(variant.values)}}
            submitted.append(runs.submit(variant.spec, workplace, by, request, start=False))
    except Refusal:
        for run in submitted:
            with contextlib.suppress(Refusal):  # a studio's tick may have started it in the meantime
                runs.stop(run, "kill", by)
                runs.delete(runs.read(run.path, workplace.saves))
        raise
    engines.advance(workplace.saves, standby.hand_over)
    return [runs.read(run.path, workplace.saves) for run in submitted]


def _in_run(variant: Variant, obstacle: Problem) -> Problem:
    values = ", ".join(f"{path} = {value}" for path, value in variant.values.items())
    why = {language: obstacle.text(language) for language in ("en", "zh")}
    return problem("sweep-run", obstacle.field, values=values, why=why)


def stop(saves: Path, id: str, by: str = "", spared: Callable[[Run], bool] = lambda _: False) -> list[Run]:
    """Stop all runs of a sweep that have not ended: those that wait, and then, with a checkpoint, those that train; not
    those that are `spared`. Returns those that are stopped."""
    left = [run for run in members(saves, id) if not (run.final or run.request.get("stop") or spared(run))]
    stopped = []
    for run in sorted(left, key=lambda run: run.state != "queued"):  # otherwise a waiting one starts in the meantime
        with contextlib.suppress(Refusal):  # it has just ended
            runs.stop(run, "kill" if run.state == "queued" else "save", by)
            stopped.append(run)
    return stopped


# ------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class Objective:
    """The curve by which runs of a stage are compared, as arrays of shape (points,)."""

    name: str
    step: np.ndarray
    value: np.ndarray

    @property
    def sign(self) -> int:
        """1 if lower is better, -1 if higher is."""
        return sign(self.name)

    def until(self, step: float) -> np.ndarray:
        """The values up to a step, with the sign that makes lower ones better."""
        return self.sign * self.value[self.step <= step]


def objective(run: Run) -> Objective | None:
    """The first of `curves_to_compare` that the run has logged."""
    curves = progress.curves(run)
    for name in curves_to_compare(run.facts.stage):
        if name in curves:
            finite = np.isfinite(curves[name].value)
            return Objective(name, curves[name].step[finite], curves[name].value[finite])
    return None


def median_verdict(own: Objective, others: Sequence[Objective]) -> tuple[float, float, float] | None:
    """The median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2): whether the best value of a run until
    its newest step is worse than the median of the others' running averages until that step. Returns this step, the
    best value and the median if so. Others that have not come as far are not counted."""
    if len(own.step) < LEAST_POINTS:
        return None
    step = float(own.step[-1])
    averages = [
        float(other.until(step).mean())
        for other in others
        if other.name == own.name and len(other.step) and other.step[-1] >= step and len(other.until(step))
    ]
    if len(averages) < LEAST_OTHERS:
        return None
    lowest, median = float(own.until(step).min()), float(np.median(averages))
    return (step, own.sign * lowest, own.sign * median) if lowest > median else None
