"""Compare several runs: differing settings, final figures, groups of a sweep, and CSV.

A run is compared by the current state of its folder. A run with an unreadable spec still has curves and figures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.core import rundir
from engine.core.csvtext import as_csv
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, distinct_titles, read_json
from engine.core.stages import STAGES
from engine.models.discovery import identity
from engine.runs import progress, runs, sweep_standing
from engine.runs.progress import Series
from engine.runs.run import Run, sweep_of
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields

MAX_RUNS_COMPARED = 50  # runs side by side
READER_THREADS = 2  # curves read in parallel
ABSENT = Ellipsis  # the value of a setting that a run does not have; None is a value
BY_NAME = "name"  # groups runs by the prefix of their names


# ------------------------------------------------------------------------------------------ which runs


def training_runs(saves: Path) -> list[Run]:
    """All training runs, newest first."""
    return runs.find(saves, "training")


def select_runs(saves: Path, ids: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The first MAX_RUNS_COMPARED of the runs with these ids, each once, and the ids that do not exist."""
    selected, missing = [], []
    for id in dict.fromkeys(ids):
        try:
            selected.append(runs.get(saves, id))
        except Refusal:
            missing.append(id)
    return selected[:MAX_RUNS_COMPARED], missing


def siblings(run: Run, known: Sequence[Run], most: int = 10) -> list[Run]:
    """The run, then the others of its sweep in order, of too many the best ones; without a sweep, the newest others of
    the same base and stage."""
    if sweep := sweep_of(run):
        others = [other for other in reversed(known) if sweep_of(other).get("id") == sweep["id"] and other.id != run.id]
        kept = {other.id for other in sweep_standing.ranked(others)[: MAX_RUNS_COMPARED - 1]}
        return [run, *(other for other in others if other.id in kept)]
    alike = [
        other
        for other in known
        if run.facts.stage and other.id != run.id and _base_and_stage(other) == _base_and_stage(run)
    ]
    return [run, *alike][:most]


def runs_of_sweep(chosen: Sequence[Run], known: Sequence[Run]) -> int | None:
    """How many runs the sweep has to which all chosen runs belong, if that is more than can be compared."""
    ids = {sweep_of(run).get("id") for run in chosen}
    if len(ids) != 1 or None in ids:
        return None
    count = sum(sweep_of(run).get("id") in ids for run in known)
    return count if count > MAX_RUNS_COMPARED else None


def _base_and_stage(run: Run) -> tuple[str, str]:
    return identity(run.facts.base), run.facts.stage


def display_names(chosen: Sequence[Run]) -> list[str]:
    """The title of each run: its name, with its folder added to duplicates."""
    called = distinct_titles({run.id: run.title for run in chosen})
    return [called[run.id] for run in chosen]


def spec_of(run: Run) -> RunSpec | None:
    """The run's spec; None if it cannot be read, or is of another kind."""
    try:
        spec = run.spec
    except (Refusal, OSError, UnicodeDecodeError):
        return None
    return spec if isinstance(spec, RunSpec) else None


def stamp(chosen: Sequence[Run]) -> str:
    """A value that changes when anything that is compared changes."""
    return "|".join(
        f"{run.id} {run.state} {rundir.stamp((run.dir.metrics, run.dir.spec, run.dir.exit))}" for run in chosen
    )


def curves(chosen: Sequence[Run]) -> list[dict[str, Series]]:
    """The logged curves of each run, by name. Several files are read in parallel."""
    with ThreadPoolExecutor(READER_THREADS) as pool:
        return list(pool.map(progress.curves, chosen))


# ------------------------------------------------------------------------------------------ what differs


@dataclass(frozen=True)
class Difference:
    """A setting and its value in each run; ABSENT if the run does not have it."""

    path: str
    values: tuple[Any, ...]


def differences(specs: Sequence[RunSpec | None]) -> list[Difference]:
    """The settings that differ between specs, in the order of declaration.

    A stage or method has settings that others do not have. An unreadable spec is None: it has no settings, and causes
    no differences. The name of a run does not count as a setting.
    """
    plain = [None if spec is None else spec.model_dump(mode="json") for spec in specs]
    differing = []
    for path in fields():
        if path == "name":
            continue
        values = tuple(ABSENT if settings is None else _value(settings, path) for settings in plain)
        known = [_comparable(value) for value, settings in zip(values, plain, strict=True) if settings is not None]
        if any(value != known[0] for value in known):
            differing.append(Difference(path, values))
    return differing


def _value(plain: Mapping[str, Any], path: str) -> Any:
    """The setting at `path`; for a choice between kinds, the kind."""
    value: Any = plain
    for step in path.split("."):
        if step not in value:
            return ABSENT
        value = value[step]
    return value["kind"] if path in SPEC_CHOICES else value


def _comparable(value: Any) -> Any:
    """Equal for two paths to the same folder."""
    return identity(value) if isinstance(value, str) and os.path.isabs(value) else value


def format_value(value: Any) -> str:
    """A value in one line: {"names": 2.0, "chats": 1.0} → "names × 2, chats"."""
    if isinstance(value, Mapping):
        return ", ".join(_format_entry(name, inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "" if value is None else str(value)


def _format_entry(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return name if value == 1 else f"{name} × {format_value(float(value))}"
    return f"{name}: {format_value(value)}"


# ------------------------------------------------------------------------------------------ figures at the end

# Which direction of a curve is better, by its name; for all others, this is unknown.
LOWER, HIGHER = "lower", "higher"
BETTER = dict.fromkeys(("loss", "nll_loss", "odds_ratio_loss", "value_loss", "perplexity"), LOWER) | dict.fromkeys(
    (
        "mean_token_accuracy",
        "accuracy",
        "margin",
        "rewards/margins",
        "rewards/accuracies",
        "reward",
        "mean_reward",
        "log_odds_ratio",
        "tokens_per_s",
    ),
    HIGHER,
)
BETTER["peak_memory"] = BETTER["peak_device_memory"] = LOWER


@dataclass(frozen=True)
class Figure:
    """One figure of each run; NaN if it has none. `of`: "last" or "best" of a curve, "" for other figures. `best`: the
    places of the best runs."""

    name: str
    of: str
    values: tuple[float, ...]
    best: frozenset[int] = frozenset()


def better(name: str) -> str:
    """LOWER, HIGHER, or "" if neither is better in itself."""
    return BETTER.get(name.removeprefix("eval_"), "")


def figures(chosen: Sequence[Run], logged: Sequence[Mapping[str, Series]]) -> list[Figure]:
    """The final figures of the runs: last and best of the losses and of the main curves of their stages, then the
    resources used.

    The best value of a curve is marked only among runs with one stage and one loss, since others measure different
    things.
    """
    specs = [spec_of(run) for run in chosen]
    measure = {(spec.stage.kind, getattr(spec.stage, "loss_type", "")) for spec in specs if spec}
    candidates = []
    for name in _key_curves(specs, logged):
        for of in ("last", "best") if better(name) else ("last",):
            values = tuple(_end_value(curve.get(name), of, better(name)) for curve in logged)
            candidates.append(_figure(name, of, values, mark=len(measure) < 2))
    for name, count in RUN_MEASURES.items():
        candidates.append(_figure(name, "", tuple(map(count, chosen, logged)), mark=True))
    return [figure for figure in candidates if np.isfinite(figure.values).any()]


def _key_curves(specs: Sequence[RunSpec | None], logged: Sequence[Mapping[str, Series]]) -> list[str]:
    stages = dict.fromkeys(spec.stage.kind for spec in specs if spec)
    quantities = ["loss", *(name for stage in stages if stage in STAGES for name in STAGES[stage].curves)]
    quantities += [STAGES[stage].best for stage in stages if stage in STAGES]
    known = {name for curve in logged for name in curve}
    return [
        curve_name for name in dict.fromkeys(quantities) for curve_name in (name, f"eval_{name}") if curve_name in known
    ]


def _figure(name: str, of: str, values: tuple[float, ...], mark: bool) -> Figure:
    finite = [value for value in values if np.isfinite(value)]
    if not (mark and better(name) and len(finite) > 1 and min(finite) < max(finite)):
        return Figure(name, of, values)
    top = min(finite) if better(name) == LOWER else max(finite)
    return Figure(name, of, values, frozenset(place for place, value in enumerate(values) if value == top))


def _end_value(series: Series | None, of: str, which: str) -> float:
    if series is None:
        return np.nan
    part = series.value if of == "last" else series.low if which == LOWER else series.high
    part = part[np.isfinite(part)]
    if not len(part):
        return np.nan
    return float(part[-1] if of == "last" else part.min() if which == LOWER else part.max())


def _furthest(logged: Mapping[str, Series], axis: str) -> float:
    ends = [float(getattr(series, axis)[-1]) for series in logged.values() if len(series.step)]
    return max((end for end in ends if np.isfinite(end)), default=np.nan)


def _rate(logged: Mapping[str, Series]) -> float:
    seconds = _furthest(logged, "time")
    return _furthest(logged, "tokens") / seconds if seconds > 0 else np.nan


def _device_memory(run: Run) -> float:
    folder = run.dir.result()
    return ((read_json(folder / RESULT_FILE) if folder else None) or {}).get("peak_device_memory") or np.nan


RUN_MEASURES = {
    "steps": lambda _run, logged: _furthest(logged, "step"),
    "epochs": lambda _run, logged: _furthest(logged, "epoch"),
    "tokens": lambda _run, logged: _furthest(logged, "tokens"),
    "duration": lambda _run, logged: _furthest(logged, "time"),
    "tokens_per_s": lambda _run, logged: _rate(logged),
    "peak_memory": lambda run, _logged: (run.exit or {}).get("peak_memory") or np.nan,
    "peak_device_memory": lambda run, _logged: _device_memory(run),
}


# ------------------------------------------------------------------------------------------ sweeps


@dataclass(frozen=True)
class Group:
    """A group of runs: the common value, and the places of the runs."""

    value: Any
    places: tuple[int, ...]


def group_runs(chosen: Sequence[Run], by: str) -> list[Group]:
    """The runs by their value of the setting at `by` or, with BY_NAME, by their names without the number at the end
    ("rank-8-1" and "rank-8-2" → "rank-8"); in numerical order if all values are numbers."""
    values: list[Any]
    if by == BY_NAME:
        values = [re.sub(r"[\W_]*\d+$", "", name) or name for name in display_names(chosen)]
    else:
        specs = [spec_of(run) for run in chosen]
        values = [ABSENT if spec is None else _value(spec.model_dump(mode="json"), by) for spec in specs]
    places_by_value: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        places_by_value.setdefault(repr(_comparable(value)), []).append(place)
    groups = [Group(values[places[0]], tuple(places)) for places in places_by_value.values()]
    if all(type(group.value) in (int, float) for group in groups):
        groups.sort(key=lambda group: group.value)
    return groups


def best_groups(figure: Figure, groups: Sequence[Group]) -> frozenset[int]:
    """The places of the groups with the best mean of a figure; none if the best of the runs is not marked, either."""
    means = tuple(mean_and_spread(figure.values, group)[0] for group in groups)
    return _figure(figure.name, figure.of, means, mark=bool(figure.best)).best


def mean_and_spread(values: Sequence[float], group: Group) -> tuple[float, float, int]:
    """Mean, sample standard deviation and number of the finite values in a group; NaN if there are too few."""
    finite = np.array([values[place] for place in group.places], dtype=float)
    finite = finite[np.isfinite(finite)]
    mean = float(finite.mean()) if len(finite) else np.nan
    return mean, float(finite.std(ddof=1)) if len(finite) > 1 else np.nan, len(finite)


# ------------------------------------------------------------------------------------------ CSV


def curves_csv(chosen: Sequence[Run], metric: str) -> str:
    """One curve of every run, a line for each stored point: its mean, lowest and highest value."""
    rows: list[Sequence[Any]] = [("run", "step", "epoch", "time_s", "tokens", metric, "low", "high")]
    for name, logged in zip(display_names(chosen), curves(chosen), strict=True):
        if series := logged.get(metric):
            columns = (
                series.step,
                series.epoch,
                series.time,
                series.tokens,
                series.value,
                series.low,
                series.high,
            )
            rows += [(name, *point) for point in np.column_stack(columns).tolist()]
    return as_csv(rows)
