"""What may be combined with which strategy (`hardware.strategy`): the table that the form, the checks before a start
and docs/strategies.md share.

With a single process and with DDP, all settings work. FSDP2 is offered only for what has been compared with one process
(`tests/test_sharding.py`): some combinations of libraries train on without an error, but not what they should.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Problem, problem
from engine.spec.run_spec import SPEC_CHOICES, RunSpec


@dataclass(frozen=True)
class Limit:
    """A setting that only some values of are possible with FSDP2. `stages`: the stages in which this is so; () for
    all."""

    path: str
    allowed: tuple[Any, ...]
    stages: tuple[str, ...] = ()

    def applies_to(self, spec: RunSpec) -> bool:
        return not self.stages or spec.stage.kind in self.stages


COMPARED_WITH_REFERENCE = ("dpo", "kto", "grpo")  # stages with a second copy of trained weights
FSDP2_LIMITS = (
    Limit("stage", ("pt", "sft", "dpo", "kto", "orpo", "simpo", "grpo")),
    Limit("method", ("lora", "freeze", "full")),
    Limit("method", ("lora", "full"), COMPARED_WITH_REFERENCE),
    Limit("model.quantization", ("none", "4bit")),
    Limit("model.quantization.bnb_4bit_compute_dtype", ("auto",)),
    Limit("training.optim", ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")),
    Limit("training.precision", ("auto", "bf16", "fp32")),
    Limit("training.gradient_checkpointing", (True, False)),
    Limit("data.packing", (True, False)),
    Limit("method.use_dora", (False,)),
    Limit("method.init_lora_weights", ("default", "gaussian")),
    Limit("method.loraplus_lr_ratio", (None,)),
    Limit("method.expert_r", (None,)),
    Limit("method.modules_to_save", ([],)),
    Limit("model.add_tokens", ([],)),
    Limit("model.add_special_tokens", ([],)),
    Limit("model.resize_embeddings", (False,)),
    Limit("vision.language_part", ("method",)),
    Limit("vision.tower", ("frozen",)),
    Limit("vision.projector", ("frozen",)),
    Limit("stage.reward_model", ("",), ("grpo",)),
)
# Extra arguments that change how a model is computed, loaded or optimized.
EXTRA_NOT_WITH_FSDP2 = (
    "activation_offloading", "auto_find_batch_size", "full_determinism", "liger_kernel_config", "sync_ref_model",
    "torch_compile", "use_liger_kernel", "use_vllm",
)  # fmt: skip


def value_at(spec: RunSpec, path: str) -> Any:
    """The value of the setting at a path, or the kind of a choice; None if the chosen kind does not have the
    setting."""
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value.kind if path in SPEC_CHOICES else value


def fsdp2_limits(spec: RunSpec) -> Iterator[tuple[Limit, Any]]:
    """What of `spec` is not possible with FSDP2: each limit with the value that exceeds it."""
    for limit in FSDP2_LIMITS:
        value = value_at(spec, limit.path)
        if limit.applies_to(spec) and value is not None and value not in limit.allowed:
            yield limit, value


def strategy_problems(spec: RunSpec) -> list[Problem]:
    """A strategy that does not fit the number of processes, or excludes other settings."""
    kind, processes = spec.hardware.strategy.kind, spec.hardware.num_processes
    if kind == "single" and processes > 1:
        return [problem("strategy-single", "hardware.strategy", processes=processes)]
    if kind in ("ddp", "fsdp2") and processes == 1:
        return [problem("strategy-needs-processes", "hardware.num_processes", strategy=kind)]
    return fsdp2_problems(spec) if kind == "fsdp2" else []


def fsdp2_problems(spec: RunSpec) -> list[Problem]:
    """Settings that FSDP2 excludes, each at its field."""
    problems = [
        problem("fsdp2-not-with", limit.path, given=value, allowed=", ".join(map(_named, limit.allowed)))
        for limit, value in fsdp2_limits(spec)
    ]
    extra = [name for name in EXTRA_NOT_WITH_FSDP2 if spec.extra.get(name)]
    return problems + [problem("fsdp2-not-with-extra", f"extra.{name}", name=name) for name in extra]


def _named(value: Any) -> str:
    return "—" if value in (None, [], "") else str(value)
