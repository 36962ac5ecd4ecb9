"""Specs that train on the open set: the one for the form, and the one by which rows are shown as tokens."""

from __future__ import annotations

from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.stages import KINDS_BY_FORM, STAGES
from engine.data.datasets import Dataset
from engine.launch.workspace import Workplace
from engine.models.checks import model_problems
from engine.preflight.model_checks import chosen_template_problems
from engine.spec.run_spec import RunSpec
from webui.words import Words


def stages_for(dataset: Dataset) -> list[str]:
    """The stages that train on rows of this kind."""
    return [name for name, stage in STAGES.items() if dataset.kind in KINDS_BY_FORM[stage.form]]


def training_spec(spec: RunSpec, dataset: Dataset) -> RunSpec:
    """The spec for this set, with a suitable stage. Raises Refusal if its rows cannot be read here."""
    if dataset.problem or not dataset.files:
        raise Refusal(dataset.problem or problem("dataset-on-hub", name=dataset.name, hub=dataset.hub))
    stages = stages_for(dataset)
    if spec.stage.kind not in stages:
        spec = spec.change("stage", {"kind": stages[0]})
    return spec.change("data.datasets", {dataset.name: 1.0})


def preview_spec(
    spec: RunSpec, dataset: Dataset, stage: str, settings: dict[str, Any], workplace: Workplace, words: Words
) -> RunSpec:
    """The spec for this set with another stage ("" = its own) and settings, if its model has a tokenizer on this
    machine. Raises Refusal."""
    if stage and stage != spec.stage.kind:
        spec = spec.change("stage", {"kind": stage})
    for path, value in (settings | {"data.datasets": {dataset.name: 1.0}}).items():
        spec = spec.change(path, value)
    stages = stages_for(dataset)
    if spec.stage.kind not in stages:
        labels = ", ".join(words.choice("stage", name) for name in stages)
        raise Refusal(problem("set-stage", name=dataset.name, stages=labels))
    model = spec.model.model_name_or_path
    allowed = spec.model.trust_remote_code and workplace.allows_code_of(model)
    spec = workplace.frozen(spec.change("model.trust_remote_code", allowed))
    problems = [
        *(workplace.problems(spec) or chosen_template_problems(spec)),
        *model_problems(spec.model.model_name_or_path, workplace.models, allow_remote_code=allowed),
    ]
    if problems:
        raise Refusal(problems)
    return spec
