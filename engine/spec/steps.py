"""How many examples and optimizer steps a training has."""

from __future__ import annotations

import math

from engine.spec.run_spec import RunSpec


def examples_per_step(spec: RunSpec) -> int:
    """How many examples, or answers that the model writes, one optimizer step is made from, on all devices."""
    training = spec.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * spec.hardware.num_processes


def optimizer_steps(spec: RunSpec, rows: int) -> int:
    """Optimizer steps of a run over `rows` training examples, as transformers' Trainer counts them."""
    if spec.training.max_steps:
        return spec.training.max_steps
    if spec.stage.kind == "grpo":
        # A step has as many questions as there is room for groups of answers; the last, smaller lot is left out.
        questions = max(examples_per_step(spec) // spec.stage.num_generations, 1)
        return math.ceil(spec.training.num_train_epochs * (rows // questions) * spec.stage.num_iterations)
    per_process = math.ceil(rows / spec.hardware.num_processes)
    batches = math.ceil(per_process / spec.training.per_device_train_batch_size)
    per_epoch = max(math.ceil(batches / spec.training.gradient_accumulation_steps), 1)
    return math.ceil(spec.training.num_train_epochs * per_epoch)
