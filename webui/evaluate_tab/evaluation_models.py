"""The models that can be evaluated: bases and the results of training runs. Read from the folders each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.problems import Refusal, problem
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import Workplace, is_inside
from engine.models.discovery import identity
from engine.runs import recent, results, runs
from engine.runs.results import Result
from engine.runs.runs import Run
from webui.pickers import MAX_OFFERED
from webui.words import Words


@dataclass(frozen=True)
class EvaluationModels:
    """`bases` lists the possible bases as (label, folder). A result is identified by its folder."""

    words: Words
    workplace: Workplace
    bases: Callable[[], list[tuple[str, str]]]

    def trained_results(self, base: str | None) -> list[Result]:
        """The results of training runs: those of `base` first, each group from newest to oldest."""
        known = [result for result in results.results(self.workplace.saves) if result.run.kind == "training"]
        belong = functools.cache(
            lambda name: identity(name) == identity(base or "")
        )  # thousands of runs have a few bases
        return sorted(known, key=lambda result: not belong(recent.base_named(result)))

    def result_choices(self, base: str | None) -> list[tuple[str, str]]:
        """The results as (label, folder); the label names the base if it is another one."""
        known = self.trained_results(base)
        titles = results.titles(known)

        def label(result: Result) -> str:
            other = [] if belongs(result, base) else [Path(recent.base_named(result)).name]
            return " · ".join([titles[result.run.id], self.words.choice("stage", result.stage), *other])

        return [(label(result), str(result.folder)) for result in known]

    def judges(self) -> list[tuple[str, str]]:
        """The models that can judge as (label, folder): bases, and results that write answers."""
        known = [result for result in self.trained_results(None) if result.stage != "rm"][:MAX_OFFERED]
        titles = results.titles(known)
        return [*self.bases(), *((titles[result.run.id], str(result.folder)) for result in known)]

    def selected_results(self, base: str | None, folders: Sequence[str] | None) -> list[Result]:
        """The results in `folders` that belong to `base`."""
        return [
            result
            for result in self.trained_results(base)
            if belongs(result, base) and str(result.folder) in (folders or ())
        ]

    def only_reward_models(self, base: str | None, folders: Sequence[str] | None) -> bool:
        """Whether all selected results are reward models; False if none is selected."""
        selected = self.selected_results(base, folders)
        return bool(selected) and all(result.stage == "rm" for result in selected)

    def base_of_last(self, base: str | None, folders: Sequence[str] | None) -> str | None:
        """The base of the result that was selected last; `base` itself if it is the same model."""
        last_folder = list(folders or ())[-1:]
        known = results.results(self.workplace.saves)
        last = next((result for result in known if str(result.folder) in last_folder), None)
        if last is None or belongs(last, base):
            return base
        return recent.matching_folder(recent.base_named(last), [folder for _, folder in self.bases()])

    def first(self, folders: Sequence[str] | None) -> tuple[str | None, Sequence[str] | None]:
        """The default base and results: those of the newest finished run, else the model used last. Results that are
        selected already, `folders`, are kept."""
        bases = [folder for _, folder in self.bases()]
        untrained = [folder for folder in bases if not is_inside(Path(folder), (self.workplace.saves,))]
        if newest := recent.newest_result(self.workplace, untrained, lambda _: True):
            base, result = newest
            return base, folders or [str(result.folder)]
        model = recent.first_model(self.workplace)
        return (str(model.path) if model else next(iter(bases), None)), folders

    def of_open(self, id: str) -> tuple[str, list[str]] | None:
        """The base and the results of an open run, or those which an open evaluation compares; None if it has none."""
        try:
            run = runs.get(self.workplace.saves, id)
            if isinstance(run.spec, EvaluationSpec):
                return (run.spec.model.model_name_or_path, run.spec.results) if run.spec.results else None
            return self.of_run(run)
        except Refusal:
            return None

    def of_run(self, run: Run) -> tuple[str, list[str]]:
        """The base and the results with which to evaluate a run. Raises Refusal if it has no result."""
        result = results.result_of(run)
        if result is None:
            raise Refusal(problem("chat-no-result", id=run.id))
        if run.kind != "training":  # a whole model that an export has made
            return str(result.folder), []
        return run.spec.model.model_name_or_path, [str(result.folder)]


def belongs(result: Result, base: str | None) -> bool:
    """Whether a result was trained from `base`, as an adapter or as a whole model."""
    return result.run.kind == "training" and identity(recent.base_named(result)) == identity(base or "")
