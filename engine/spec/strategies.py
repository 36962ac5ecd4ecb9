"""What may be combined with which strategy (`hardware.strategy`): the table that the form, the checks before a start
and docs/strategies.md share.

With a single process and with DDP, all settings work. FSDP2 is offered only for what has been compared with one process
(`tests/test_sharding.py`): some combinations of libraries train on without an error, but not what they should.
"""

from __future__ import annotations

from engine.core.problems import Problem, problem
from engine.spec.run_spec import RunSpec
from engine.spec.setting_limits import Limit, exceeded, named

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


def strategy_problems(spec: RunSpec) -> list[Problem]:
    """A strategy that does not fit the number of processes, or excludes other settings."""
    kind, processes = spec.hardware.strategy.kind, spec.hardware.num_processes
    if kind == "single" and processes > 1:
        return [problem("strategy-single", "hardware.strategy", processes=processes)]
    if kind in ("ddp", "fsdp2") and processes == 1:
        return [problem("strategy-needs-processes", "hardware.num_processes", strategy=kind)]
    return _hybrid_problems(spec) + fsdp2_problems(spec) if kind == "fsdp2" else []


def _hybrid_problems(spec: RunSpec) -> list[Problem]:
    """Copies of the model on machines that cannot divide them."""
    chosen = spec.hardware
    if getattr(chosen.strategy, "sharding", "") != "hybrid" or chosen.can_be_hybrid:
        return []
    values = {"machines": chosen.machines, "processes": chosen.processes_per_machine}
    return [problem("hybrid-needs-machines", "hardware.strategy.sharding", **values)]


def fsdp2_problems(spec: RunSpec) -> list[Problem]:
    """Settings that FSDP2 excludes, each at its field."""
    problems = [
        problem("fsdp2-not-with", limit.path, given=value, allowed=named(limit.allowed))
        for limit, value in exceeded(FSDP2_LIMITS, spec)
    ]
    extra = [name for name in EXTRA_NOT_WITH_FSDP2 if spec.extra.get(name)]
    return problems + [problem("fsdp2-not-with-extra", f"extra.{name}", name=name) for name in extra]
