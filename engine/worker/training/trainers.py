"""The function that creates the trainer of each stage, and the arguments of its configuration class."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from engine.core.rundir import RunDir
from engine.core.stages import STAGES
from engine.spec.run_spec import RunSpec
from engine.spec.trainer_arguments import RENAMED_ARGUMENTS
from engine.worker.models.loading import precision
from engine.worker.runtime.devices import has_gpus
from engine.worker.runtime.sharding import zero_stage

# Stage → location of its function: TrainingContext → a transformers Trainer that has not started. Named instead of
# imported, because TRL's trainers take a second or more each to import, and a run needs one of them.
TRAINERS = {
    "pt": "engine.worker.training.sft:sft_trainer",
    "sft": "engine.worker.training.sft:sft_trainer",
    "rm": "engine.worker.training.reward:reward_trainer",
    "dpo": "engine.worker.training.preference:dpo_trainer",
    "kto": "engine.worker.training.preference:kto_trainer",
    "orpo": "engine.worker.training.preference:reference_free_trainer",
    "simpo": "engine.worker.training.preference:reference_free_trainer",
    "ppo": "engine.worker.training.ppo:ppo_trainer",
    "grpo": "engine.worker.training.grpo:grpo_trainer",
}


def trainer_of(stage: str) -> Callable[..., Trainer]:
    """The function that creates the trainer of a stage."""
    module, name = TRAINERS[stage].split(":")
    return getattr(importlib.import_module(module), name)


def common_arguments(spec: RunSpec, run: RunDir, *, measured: bool) -> dict[str, Any]:
    """Arguments that the configuration classes of all stages share, according to the spec."""
    training, logging = spec.training, spec.logging
    numbers = precision(spec)
    best = STAGES[spec.stage.kind].best
    names = (
        "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
        "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "gradient_checkpointing",
        "neftune_noise_alpha", "per_device_eval_batch_size", "seed",
    )  # fmt: skip
    return {
        **{name: getattr(training, name) for name in names},
        "gradient_checkpointing_kwargs": {"use_reentrant": _recomputes_with_reentry(spec)},
        "max_steps": training.max_steps or -1,
        "bf16": numbers == "bf16",
        "fp16": numbers == "fp16",
        "use_cpu": not has_gpus(),
        "dataloader_pin_memory": has_gpus(),
        "output_dir": str(run.path),
        "run_name": spec.name or run.path.name,
        "logging_steps": logging.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would print the last good loss instead of NaN
        "eval_strategy": logging.eval_strategy if measured else "no",
        "eval_steps": logging.eval_steps if measured else None,
        # The first validation point is the initial model; if validation generates answers, this takes too long.
        "eval_on_start": measured and not STAGES[spec.stage.kind].answers,
        "save_strategy": logging.save_strategy,
        "save_steps": logging.save_steps,
        "save_total_limit": None,  # the run's callback prunes, once the newest is known to be complete
        "load_best_model_at_end": logging.load_best_model_at_end,
        "metric_for_best_model": f"eval_{best}" if measured else None,
        "greater_is_better": best != "loss" if measured else None,
        "report_to": list(logging.report_to) or "none",
        "disable_tqdm": True,
        **spec.extra,
    }


def _recomputes_with_reentry(spec: RunSpec) -> bool:
    """The products of 8-bit weights keep their inputs, which only the reentrant kind of recomputation avoids; ZeRO-3
    cannot gather the frozen weights below an adapter again in the other kind."""
    return spec.model.quantization.kind == "8bit" or (spec.method.kind == "lora" and zero_stage() == 3)


def stage_arguments(spec: RunSpec) -> dict[str, Any]:
    """Arguments of the stage's own configuration class, according to its part of the spec."""
    return STAGE_ARGUMENTS.get(spec.stage.kind, lambda _: {})(spec.stage)


# Rows already have the right length, and dropout is as in the spec and the model; TRL would turn off all of it.
PREPARED_DATA_ARGUMENTS = {"max_length": None, "disable_dropout": False}


def _dpo_arguments(stage: Any) -> dict[str, Any]:
    also = stage.sft_weight > 0
    return {
        "beta": stage.beta,
        "loss_type": [stage.loss_type, "sft"] if also else [stage.loss_type],
        "loss_weights": [1.0, stage.sft_weight] if also else None,
        "label_smoothing": stage.label_smoothing,
        **PREPARED_DATA_ARGUMENTS,
    }


def _kto_arguments(stage: Any) -> dict[str, Any]:
    names = ("beta", "desirable_weight", "undesirable_weight")
    return {**{name: getattr(stage, name) for name in names}, **PREPARED_DATA_ARGUMENTS}


def _grpo_arguments(stage: Any) -> dict[str, Any]:
    renamed = RENAMED_ARGUMENTS["grpo"]
    elsewhere = (
        "kind",
        "rewards",
        "reward_pattern",
        "reward_length",
        "reward_file",
        "reward_model",
        "sample_steps",
    )
    return {
        **{renamed.get(name, name): value for name, value in stage if name not in elsewhere},
        "reward_weights": list(stage.rewards.values()),
    }


STAGE_ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "rm": lambda stage: {
        "center_rewards_coefficient": stage.center_rewards_coefficient,
        **PREPARED_DATA_ARGUMENTS,
    },
    "dpo": _dpo_arguments,
    "kto": _kto_arguments,
    "grpo": _grpo_arguments,
}


def assert_effective(spec: RunSpec, run: RunDir, trainer: Trainer) -> None:
    """Checks that the trainer's configuration equals the spec, whatever its constructor did to it.

    Raises AssertionError with every setting that differs.
    """
    expected = common_arguments(spec, run, measured=trainer.eval_dataset is not None) | stage_arguments(spec)
    differing = []
    for name, value in expected.items():
        effective = getattr(trainer.args, name)
        effective = getattr(effective, "value", effective)
        if name == "report_to":
            effective, value = list(effective or []), [] if value == "none" else value
        same = (
            math.isclose(effective, value) if isinstance(value, float) and effective is not None else effective == value
        )
        if not same:
            differing.append(f"{name}: the spec says {value!r}, the trainer has {effective!r}")
    assert not differing, "; ".join(differing)
