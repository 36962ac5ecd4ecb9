"""Change a training's settings until it is estimated to fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from engine.core.problems import Refusal
from engine.models.facts import ModelFacts
from engine.preflight import memory
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.steps import examples_per_step


def fit_to_memory(
    spec: RunSpec, model: ModelFacts, gpu_count: int, available: float, without: Collection[str] = ()
) -> RunSpec | None:
    """The spec with the fewest changes with which it fits into `available` bytes, cheap changes first; itself if it
    fits unchanged, None if nothing helps. `without`: parts of bitsandbytes ("4bit", "optimizer") that do not work
    here."""

    def total(changes: list[tuple[str, Any]]) -> float:
        need = memory.memory_needed(_changed(spec, changes), model, gpu_count, available)
        return need.total if need else 0.0

    codes = {problem.code for problem in spec_problems(spec)}
    changes_made: list[tuple[str, Any]] = []
    for change in _memory_savers(spec, without):
        if total(changes_made) <= available:
            break
        with contextlib.suppress(Refusal):  # a number beyond its limit, or two settings that exclude each other
            allowed = codes.issuperset(
                problem.code for problem in spec_problems(_changed(spec, [*changes_made, change]))
            )
            if allowed and total([*changes_made, change]) < total(changes_made):
                changes_made.append(change)
    if total(changes_made) > available:
        return None
    for change in reversed(changes_made[:-1]):  # made unnecessary by a later change
        fewer = [other for other in changes_made if other is not change]
        with contextlib.suppress(Refusal):
            changes_made = fewer if total(fewer) <= available else changes_made
    return _changed(spec, changes_made)


def _changed(spec: RunSpec, changes: list[tuple[str, Any]]) -> RunSpec:
    """Keeps the number of examples per step. Raises Refusal for an invalid setting."""
    many = examples_per_step(spec) // spec.hardware.num_processes
    for path, value in changes:
        spec = spec.change(path, value)
    return spec.change("training.gradient_accumulation_steps", many // spec.training.per_device_train_batch_size)


def _memory_savers(spec: RunSpec, without: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Changes that may save memory, as path and value."""
    yield "training.gradient_checkpointing", True
    batch = spec.training.per_device_train_batch_size
    while batch > 1 and batch % 2 == 0:
        batch //= 2
        yield "training.per_device_train_batch_size", batch
    if spec.hardware.strategy.kind == "ddp":
        yield "hardware.strategy", {"kind": "fsdp2"}
    if spec.hardware.strategy.kind == "fsdp2" and not spec.hardware.strategy.cpu_offload:
        yield "hardware.strategy", spec.hardware.strategy.model_dump() | {"reshard_after_forward": True}
    if spec.hardware.copies > 1:
        yield "hardware.strategy.sharding", "full"
    if spec.method.kind != "lora":  # not LoRA instead: that is another training, with another learning rate
        if "optimizer" not in without:
            yield "training.optim", "adamw_8bit"
    elif "4bit" not in without and spec.model.quantization.kind != "4bit":
        yield "model.quantization", {"kind": "4bit"}
