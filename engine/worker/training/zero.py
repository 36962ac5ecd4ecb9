"""DeepSpeed's ZeRO: what a training does differently whose optimizer state, or whose weights too, are divided by it.

accelerate starts DeepSpeed from the run's accelerate.yaml. Here is what it and the Trainer leave out: gradients summed
in full precision, the run's own optimizer in main memory, weights that stay in fp32 next to a forward pass in bf16,
whole weights for a file, and a check that DeepSpeed does what the spec says.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.core.problems import Refusal, problem
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import ZERO_STAGES
from engine.worker.models.loading import precision
from engine.worker.runtime.sharding import zero_stage


def complete_configuration(spec: RunSpec, arguments: TrainingArguments) -> None:
    """Add to DeepSpeed's configuration what accelerate has no options for."""
    if not zero_stage():
        return
    plugin: Any = arguments.deepspeed_plugin
    plugin.deepspeed_config |= {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        # Weights would otherwise be rounded to bf16, in the result, too.
        "bf16": {},
    }
    if precision(spec) == "bf16":
        plugin.deepspeed_config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    # Small weights would be kept whole, in one buffer of one type, and those of an adapter have another than the base.
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def full_weights(trainer: Any, *, trained_only: bool) -> dict[str, Tensor]:
    """The whole weights of a model that ZeRO-3 has divided, by name, on rank 0 in main memory; empty on the others. All
    ranks must call this together."""
    weights = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)
    return weights or {}


class ZeroCheck(TrainerCallback):
    """Ends a training in which DeepSpeed does not divide what the spec says, or does not train as it says."""

    def __init__(self, spec: RunSpec, trainer: Any):
        self.spec, self.trainer = spec, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises Refusal with what differs."""
        engine = getattr(self.trainer, "deepspeed", None)
        expected = ZERO_STAGES.get(self.spec.hardware.strategy.kind, 0)
        stage = engine.zero_optimization_stage() if engine else 0
        if stage != expected:
            raise Refusal(problem("zero-not-started", "hardware.strategy", expected=expected, stage=stage))
        if engine is None:
            return
        optimizer = engine.basic_optimizer
        used = {
            "max_grad_norm": engine.gradient_clipping(),
            "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
            "per_device_train_batch_size": engine.train_micro_batch_size_per_gpu(),
            "learning_rate": optimizer.param_groups[0]["initial_lr"],
        }
        differing = [f"{name}={value}" for name, value in used.items() if value != getattr(args, name)]
        kind, _ = self.trainer.get_optimizer_cls_and_kwargs(args)
        differing += [] if isinstance(optimizer, kind) else [f"optim={type(optimizer).__name__}"]
        if differing:
            raise Refusal(problem("zero-differs", "hardware.strategy", settings=", ".join(differing)))
