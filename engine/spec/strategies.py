"""What may be combined with which strategy (`hardware.strategy`): the table that the form, the checks before a start
and docs/strategies.md share.

With a single process and with DDP, all settings work. FSDP2 and DeepSpeed's ZeRO are offered only for what has been
compared with one process (`tests/test_sharding.py`, `tests/test_deepspeed.py`): some combinations of libraries train on
without an error, but not what they should.
"""

from __future__ import annotations

from typing import Any

from engine.core.problems import LANGUAGES, NOTHING, Problem, problem, say
from engine.spec.run_spec import RunSpec
from engine.spec.setting_limits import Limit, exceeded, named

COMPARED_WITH_REFERENCE = ("dpo", "kto", "grpo")  # stages with a second copy of trained weights
# Whatever divides the model.
OF_DIVIDED_MODELS = (
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
)
FSDP2_LIMITS = (
    Limit("stage", ("pt", "sft", "dpo", "kto", "orpo", "simpo", "grpo")),
    Limit("method", ("lora", "freeze", "full")),
    Limit("method", ("lora", "full"), COMPARED_WITH_REFERENCE),
    Limit("model.quantization", ("none", "4bit")),
    Limit("model.quantization.bnb_4bit_compute_dtype", ("auto",)),
    Limit("training.optim", ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")),
    Limit("training.precision", ("auto", "bf16", "fp32")),
    *OF_DIVIDED_MODELS,
    Limit("stage.reward_model", ("",), ("grpo",)),
)
# Both stages of ZeRO. DeepSpeed runs the optimizer on its own flat copies of the weights.
ZERO_LIMITS = (
    Limit("stage", ("pt", "sft", "dpo")),
    Limit("method", ("lora", "full")),
    Limit("model.quantization", ("none",)),
    Limit("training.optim", ("adamw_torch", "sgd"), reason="limit-flat-weights"),
    Limit("training.precision", ("auto", "bf16", "fp32"), reason="limit-loss-scale"),
    *OF_DIVIDED_MODELS,
    Limit("model.adapter_path", (None,)),
    Limit("logging.load_best_model_at_end", (False,)),
    Limit("hardware.num_machines", (1,)),
)
LIMITS = {"fsdp2": FSDP2_LIMITS, "zero2": ZERO_LIMITS, "zero3": ZERO_LIMITS}
ZERO_STAGES = {"zero2": 2, "zero3": 3}  # the stages of DeepSpeed's ZeRO
NAMES: dict[str, Any] = {  # in sentences
    "single": {"en": "single", "zh": "单进程"},
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
# Extra arguments that change how a model is computed, loaded or optimized.
EXTRA_NOT_DIVIDED = (
    "activation_offloading", "auto_find_batch_size", "full_determinism", "liger_kernel_config", "sync_ref_model",
    "torch_compile", "use_liger_kernel", "use_vllm",
)  # fmt: skip


def strategy_problems(spec: RunSpec) -> list[Problem]:
    """A strategy that does not fit the number of processes, or excludes other settings."""
    kind, processes = spec.hardware.strategy.kind, spec.hardware.num_processes
    if kind == "single" and processes > 1:
        return [problem("strategy-single", "hardware.strategy", processes=processes)]
    if kind not in ("auto", "single") and processes == 1:
        return [problem("strategy-needs-processes", "hardware.num_processes", strategy=NAMES[kind])]
    return _hybrid_problems(spec) + limit_problems(spec, kind)


def _hybrid_problems(spec: RunSpec) -> list[Problem]:
    """Copies of the model on machines that cannot divide them."""
    chosen = spec.hardware
    if getattr(chosen.strategy, "sharding", "") != "hybrid" or chosen.can_be_hybrid:
        return []
    values = {"machines": chosen.machines, "processes": chosen.processes_per_machine}
    return [problem("hybrid-needs-machines", "hardware.strategy.sharding", **values)]


def limit_problems(spec: RunSpec, strategy: str) -> list[Problem]:
    """Settings that a strategy excludes, each at its field."""
    if strategy not in LIMITS:
        return []
    chosen, problems = NAMES[strategy], list[Problem]()
    for limit, value in exceeded(LIMITS[strategy], spec):
        values = {"given": value, "allowed": named(limit.allowed), "why": reason_of(limit)}
        problems.append(problem("strategy-not-with", limit.path, strategy=chosen, **values))
    for name in filter(spec.extra.get, EXTRA_NOT_DIVIDED):
        problems.append(problem("strategy-not-with-extra", f"extra.{name}", name=name, strategy=chosen))
    return problems


def reason_of(limit: Limit) -> Any:
    """Why a limit is one, in each language; NOTHING if the reason is that nothing else has been compared."""
    return {language: say(limit.reason, language) for language in LANGUAGES} if limit.reason else NOTHING
