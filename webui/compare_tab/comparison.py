"""What is known about the compared runs: names, curves, differing settings, groups, final figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.core.stages import STAGES
from engine.runs import compare
from engine.runs.compare import Difference, Figure, Group
from engine.runs.progress import Series
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from webui import charts
from webui.compare_tab.view import View


@dataclass(frozen=True)
class Comparison:
    """Sequences with one entry per run are in the order of `runs`."""

    runs: Sequence[Run]
    titles: Sequence[str]
    specs: Sequence[RunSpec | None]  # None if it cannot be read
    curves: Sequence[Mapping[str, Series]]  # by name
    metrics: Sequence[str]  # the names of all curves, the most important first
    differences: Sequence[Difference]
    view: View
    groups: Sequence[Group]  # empty if the view has no grouping
    figures: Sequence[Figure]
    best: Collection[str]  # the ids of those that are the best of their sweeps

    @property
    def classes(self) -> list[str]:
        """The CSS classes of each run; runs in one group share theirs."""
        if not self.groups:
            return [charts.run_classes(place) for place in range(len(self.runs))]
        group_of = {place: number for number, group in enumerate(self.groups) for place in group.places}
        return [charts.run_classes(group_of[place]) for place in range(len(self.runs))]

    @property
    def titles_without_curve(self) -> list[str]:
        """Titles of the runs that have not logged the selected curve; empty if no run has logged any."""
        if not self.metrics:
            return []
        return [title for title, curves in zip(self.titles, self.curves, strict=True) if self.view.metric not in curves]

    @property
    def titles_without_spec(self) -> list[str]:
        return [title for title, spec in zip(self.titles, self.specs, strict=True) if spec is None]


def compared(runs: Sequence[Run], view: View, best: Collection[str] = ()) -> Comparison:
    """Compare runs, with `view` adjusted to what these runs have."""
    curves, specs = compare.curves(runs), [compare.spec_of(run) for run in runs]
    differences, metrics = compare.differences(specs), metrics_of(specs, curves)
    view = view.fitted(metrics, group_paths(differences))
    return Comparison(
        runs,
        compare.display_names(runs),
        specs,
        curves,
        metrics,
        differences,
        view,
        groups=compare.group_runs(runs, view.by) if view.by else [],
        figures=compare.figures(runs, curves),
        best=best,
    )


def metrics_of(specs: Sequence[RunSpec | None], curves: Sequence[Mapping[str, Series]]) -> list[str]:
    """The names of all curves: first those that matter most in these stages, each
    followed by its validation curve, then the rest in alphabetical order."""
    known = {name for logged in curves for name in logged}
    stages = dict.fromkeys(spec.stage.kind for spec in specs if spec)
    of_stages = [name for stage in stages if stage in STAGES for name in STAGES[stage].curves]
    important = [metric for name in (*of_stages, *charts.COMMON_CURVES) for metric in (name, f"eval_{name}")]
    return list(dict.fromkeys([name for name in important if name in known] + sorted(known)))


def group_paths(differences: Sequence[Difference]) -> list[str]:
    """What the runs can be grouped by: the prefix of their names, or any setting that differs."""
    return [compare.BY_NAME, *(difference.path for difference in differences)]
