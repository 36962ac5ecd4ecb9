"""FSDP2: what a training does differently whose weights are divided among its processes (`hardware.strategy`).

accelerate divides the model when the training begins (`torch.distributed.fsdp.fully_shard`), from the configuration in
the run's accelerate.yaml. Here is what it and the Trainer leave out: full precision where gradients are summed,
gradients that stay divided between the batches of a step, answers of different lengths, weights put together for a
file, and a check that the weights are divided at all.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.core.problems import Refusal, problem
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import NAMES
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.models.loading import DTYPES, precision
from engine.worker.runtime.sharding import model_copies, shards_weights, zero_stage
from engine.worker.training import zero


def local_part(weight: Tensor) -> Tensor:
    """This process's part of a weight; the weight itself if it is not divided."""
    return weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)


def prepare_sharding(spec: RunSpec, trainer: Trainer) -> None:
    """Set up a trainer that has not started for weights that will be divided; others are only checked not to be. Raises
    Refusal for rows with images."""
    strategy = spec.hardware.strategy
    expected = {"auto": shards_weights(), "fsdp2": True}.get(strategy.kind, False)
    copies = {"hybrid": spec.hardware.copies, "full": 1}.get(getattr(strategy, "sharding", ""), model_copies())
    trainer.add_callback(ShardingCheck(expected, copies))
    trainer.add_callback(zero.ZeroCheck(spec, trainer))
    images = IMAGES_COLUMN in getattr(trainer.train_dataset, "column_names", ())
    if images and (shards_weights() or zero_stage()):
        name = NAMES["fsdp2"] if shards_weights() else f"ZeRO-{zero_stage()}"
        raise Refusal(problem("strategy-images", "hardware.strategy", strategy=name))
    if not shards_weights():
        return
    accelerator: Any = trainer.accelerator
    # Otherwise each process would hold the gradients of all weights from the first batch of a step to the last.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    # What is frozen is not put together for each checkpoint of an adapter.
    accelerator.get_state_dict = partial(full_weights, trained_only=spec.method.kind == "lora")
    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers then lets each process go on until all answers have ended: each token needs the weights of all.
    base._is_fsdp_managed_module = True


def plugin_arguments(spec: RunSpec) -> dict[str, Any] | None:
    """Arguments of accelerate's plugin for FSDP that its configuration does not have; None if weights are not divided.

    By default it would sum gradients in half precision, and round the outputs of the model, its loss among them.
    """
    if not shards_weights():
        return None
    arguments: dict[str, Any] = {}
    if precision(spec) != "fp32":
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision(spec)], reduce_dtype=torch.float32)
        arguments["mixed_precision_policy"] = policy
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        arguments["cpu_offload"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return arguments


def full_weights(model: Any, *_: Any, trained_only: bool = False) -> dict[str, Tensor]:
    """The whole weights of a divided model by name, on rank 0 in main memory; empty on the others. All ranks must call
    this together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def weights_for_file(spec: RunSpec, trainer: Trainer) -> dict[str, Tensor] | None:
    """The whole weights on rank 0 if they are divided: those of the adapter, or all; otherwise None. All ranks must
    call this together."""
    trained_only = spec.method.kind == "lora"
    if zero_stage() == 3:
        return zero.full_weights(trainer, trained_only=trained_only)
    return full_weights(trainer.model, trained_only=trained_only) if shards_weights() else None


class ShardingCheck(TrainerCallback):
    """Ends a training whose weights are not divided although they should be, or the other way round. `copies`: how
    often the divided model should be there (HSDP)."""

    def __init__(self, expected: bool, copies: int):
        self.expected, self.copies = expected, copies

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Raises Refusal with the first weight that is not as expected."""
        assert model is not None  # the Trainer's
        for name, weight in model.named_parameters():
            if isinstance(weight, DTensor) != self.expected:
                code = "weights-not-sharded" if self.expected else "weights-sharded"
                raise Refusal(problem(code, "hardware.strategy", name=name))
            copies = weight.device_mesh.size() // weight.device_mesh.size(-1) if isinstance(weight, DTensor) else 1
            if self.expected and copies != self.copies:
                values = {"given": self.copies, "copies": copies, "name": name}
                raise Refusal(problem("weights-copied", "hardware.strategy.sharding", **values))
