"""What the page starts with: the model used last, and the newest finished run. Read from the folders each time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from engine.launch.workspace import DEMO_MODEL, DEMO_VISION_MODEL, PROJECT, Workplace, is_inside
from engine.models.discovery import find_models, identity
from engine.models.facts import ModelFacts
from engine.runs import runs
from engine.runs.results import Result, results

BUNDLED = (PROJECT / "data",)  # models that come with Athanor or are created by it, not the operator's


def models(workplace: Workplace) -> list[ModelFacts]:
    """Full models of the model folders: the one used last, the operator's by name, the bundled ones, the demo model."""
    there = [model for model in find_models(workplace.models) if not model.adapter_of]
    last = model_used_last(workplace, there)
    demo = os.path.realpath(DEMO_MODEL)

    def place(model: ModelFacts) -> int:
        if os.path.realpath(model.path) == demo:
            return 3
        return 0 if model == last else 1 + is_inside(model.path, BUNDLED)

    return sorted(there, key=place)


def first_model(workplace: Workplace) -> ModelFacts | None:
    """The initial model: the one used last, otherwise the first of the operator's, otherwise the demo model."""
    there = models(workplace)
    own = [model for model in there if not is_inside(model.path, BUNDLED)]
    return model_used_last(workplace, there) or next(iter(own or there[::-1]), None)


def model_used_last(workplace: Workplace, among: Iterable[ModelFacts]) -> ModelFacts | None:
    """The model of the newest run that uses one of `among`; None if there is none."""
    known = {identity(str(model.path)): model for model in among}
    for run in runs.find(workplace.saves):
        if run.facts.base and (model := known.get(identity(run.facts.base))):
            return model
    return None


def newest_result(
    workplace: Workplace, bases: Iterable[str], fits: Callable[[Result], bool]
) -> tuple[str, Result] | None:
    """The newest finished training whose result `fits` and whose base is among these folders: the base and the result.
    A full model among them is its own base. None if there is none."""
    known = {identity(folder): folder for folder in bases}
    for result in results(workplace.saves):
        if result.run.kind == "training" and result.run.state == "finished" and fits(result):
            base = known.get(identity(str(result.folder))) or known.get(identity(base_named(result)))
            if base:
                return base, result
    return None


def base_named(result: Result) -> str:
    """The base of a result as in its run's spec: a folder, or a hub ID."""
    return result.run.facts.base


def matching_folder(folder: str, bases: Iterable[str]) -> str:
    """The folder among `bases` that is the same model; otherwise `folder` itself."""
    return next((base for base in bases if identity(base) == identity(folder)), folder)


def is_demo(model: ModelFacts) -> bool:
    """Whether this is a model that comes with Athanor, for which the demo presets are."""
    return os.path.realpath(model.path) in map(os.path.realpath, (DEMO_MODEL, DEMO_VISION_MODEL))
