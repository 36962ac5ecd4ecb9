"""What prevents a training from being divided by FSDP2 or DeepSpeed: in its settings, in the model, on this machine."""

from __future__ import annotations

from engine.core.problems import NOTHING, Problem, problem
from engine.models.adapters import adapts_experts
from engine.models.facts import ModelFacts
from engine.models.structure import structure_of
from engine.preflight.suitable_gpus import gpu_without_bf16
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import LIMITS, NAMES, ZERO_STAGES, limit_problems


def fsdp2_obstacles(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Everything that prevents FSDP2, or may: this decides whether it is chosen without being asked for."""
    images = [problem("fsdp2-towers", "hardware.strategy")] if model.has_towers else []
    excluded = limit_problems(spec, "fsdp2") + model_problems(spec, model, "fsdp2") + machine_problems(spec, "fsdp2")
    return excluded + images


def machine_problems(spec: RunSpec, strategy: str) -> list[Problem]:
    """GPUs on which the precision "auto" means fp16, whose loss scaling has not been seen to work with the strategy."""
    if strategy not in LIMITS or spec.training.precision != "auto" or gpu_without_bf16(spec) is None:
        return []
    values = {"given": "auto (fp16)", "allowed": "fp32", "why": NOTHING}
    return [problem("strategy-not-with", "training.precision", strategy=NAMES[strategy], **values)]


def model_problems(spec: RunSpec, model: ModelFacts, strategy: str) -> list[Problem]:
    """What of the model prevents the strategy."""
    if strategy not in LIMITS:
        return []
    name = NAMES[strategy]
    if model.quantized:
        return [problem("stored-weights-undivided", "hardware.strategy", how=model.quantized, strategy=name)]
    if strategy in ZERO_STAGES and structure_of(model).experts:
        return [problem("zero-experts", "hardware.strategy", strategy=name)]
    if spec.model.quantization.kind != "none" and structure_of(model).quantizable:
        return [problem("fsdp2-quantized-experts", "hardware.strategy")]
    if spec.model.adapter_path and adapts_experts(spec.model.adapter_path):
        return [problem("fsdp2-expert-adapter", "hardware.strategy")]
    return []
