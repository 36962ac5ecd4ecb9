"""A request for a job → the spec of its run. What is "auto" is decided as the form's presets and defaults do."""

from __future__ import annotations

import math
from typing import Any

from engine.api.base_models import BaseModel
from engine.api.errors import ApiError
from engine.api.job_requests import (
    AUTO,
    STAGE_OF,
    DpoHyperparameters,
    JobRequest,
    ReinforcementHyperparameters,
    name_part,
)
from engine.core.problems import problem
from engine.core.stages import STAGES
from engine.launch.workspace import Workplace
from engine.runs.results import MIN_ANSWERS_PER_STEP
from engine.spec.run_spec import RunSpec
from engine.spec.stage_settings import Dpo, Grpo
from engine.spec.steps import examples_per_step


def base_learning_rate(base: BaseModel, workplace: Workplace, stage: str) -> float:
    """The learning rate for the multiplier 1: that of the model's preset, by the usual ratio for another stage."""
    spec = base.spec(workplace, stage)
    preset_stage = base.settings.get("stage", {}).get("kind", "sft")
    return spec.training.learning_rate * STAGES[stage].pace / STAGES[preset_stage].pace


def job_spec(
    request: JobRequest,
    base: BaseModel,
    workplace: Workplace,
    training: str,
    validation: str,
    weights: dict[str, float] | None = None,
) -> RunSpec:
    """The spec of the job's run on the data sets `training` and, unless "", `validation`; `weights` are those of the
    rewards of a reinforcement job. Raises ApiError or Refusal."""
    stage, settings = STAGE_OF[request.method_name], request.settings
    spec = base.spec(workplace, stage)
    multiplier = settings.learning_rate_multiplier
    changes: dict[str, Any] = {
        "name": name_part(request.suffix or ""),
        "data.datasets": {training: 1.0},
        "data.eval_datasets": [validation] if validation else [],
        "training.learning_rate": base_learning_rate(base, workplace, stage)
        * (1.0 if multiplier == AUTO else float(multiplier)),
    }
    if settings.n_epochs != AUTO:
        changes |= {"training.num_train_epochs": float(settings.n_epochs), "training.max_steps": None}
    if request.seed is not None:
        changes["training.seed"] = request.seed
    if isinstance(settings, DpoHyperparameters) and settings.beta != AUTO:
        changes["stage.beta"] = settings.beta
    if isinstance(settings, ReinforcementHyperparameters):
        changes |= _reinforcement(settings, spec, weights or {})
    for path, value in changes.items():
        spec = spec.change(path, value)
    return _with_batch_size(spec, settings.batch_size)


def _reinforcement(settings: ReinforcementHyperparameters, spec: RunSpec, weights: dict[str, float]) -> dict[str, Any]:
    changes: dict[str, Any] = {"stage.rewards": weights}
    if settings.compute_multiplier != AUTO:
        group = getattr(spec.stage, "num_generations", 1) * float(settings.compute_multiplier)
        changes["stage.num_generations"] = max(round(group), 2)
    if settings.eval_interval != AUTO:
        changes |= {"logging.eval_strategy": "steps", "logging.eval_steps": settings.eval_interval}
    return changes


def batch_size(spec: RunSpec) -> int:
    """Rows per optimizer step, on all devices; in GRPO questions, of which each has a group of answers."""
    return max(examples_per_step(spec) // getattr(spec.stage, "num_generations", 1), 1)


def decided_hyperparameters(spec: RunSpec, learning_rate: float) -> dict[str, Any]:
    """The hyperparameters of a spec in OpenAI's terms; `learning_rate` is that of the multiplier 1."""
    settings: dict[str, Any] = {
        "n_epochs": max(round(spec.training.num_train_epochs), 1),
        "batch_size": batch_size(spec),
        "learning_rate_multiplier": float(f"{spec.training.learning_rate / learning_rate:.6g}"),
    }
    if isinstance(spec.stage, Dpo):
        settings["beta"] = spec.stage.beta
    if isinstance(spec.stage, Grpo):
        multiplier = spec.stage.num_generations / Grpo.model_fields["num_generations"].default
        interval = spec.logging.eval_steps
        settings |= {"eval_interval": interval, "compute_multiplier": multiplier, "reasoning_effort": "default"}
    return settings


def _with_batch_size(spec: RunSpec, rows: int | str) -> RunSpec:
    """The spec with so many rows per step: as many per forward pass as before, if they divide them."""
    group = getattr(spec.stage, "num_generations", 1)
    if rows == AUTO:
        if group == 1:
            return spec
        rows = math.ceil(max(examples_per_step(spec), MIN_ANSWERS_PER_STEP) / group)
    each, processes = int(rows) * group, spec.hardware.num_processes
    if each % processes:
        raise ApiError(400, problem("api-batch-size", given=rows, processes=processes), "batch_size")
    each //= processes
    most = min(spec.training.per_device_train_batch_size, each)
    per_pass = max(size for size in range(1, most + 1) if each % size == 0)
    spec = spec.change("training.per_device_train_batch_size", per_pass)
    return spec.change("training.gradient_accumulation_steps", each // per_pass)
