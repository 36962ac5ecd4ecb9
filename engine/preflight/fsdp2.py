"""What prevents a training from dividing its weights with FSDP2: in its settings, in the model, on this machine."""

from __future__ import annotations

from engine.core.problems import Problem, problem
from engine.models.adapters import adapts_experts
from engine.models.facts import ModelFacts
from engine.models.structure import structure_of
from engine.preflight.suitable_gpus import gpu_without_bf16
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import fsdp2_problems


def fsdp2_obstacles(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Everything that prevents it, or may: this decides whether it is chosen without being asked for."""
    images = [problem("fsdp2-towers", "hardware.strategy")] if model.has_towers else []
    return fsdp2_problems(spec) + fsdp2_model_problems(spec, model) + fsdp2_machine_problems(spec) + images


def fsdp2_machine_problems(spec: RunSpec) -> list[Problem]:
    """GPUs on which the precision "auto" means fp16, whose loss scaling has not been seen to work with it."""
    if spec.training.precision != "auto" or gpu_without_bf16(spec) is None:
        return []
    return [problem("fsdp2-not-with", "training.precision", given="auto (fp16)", allowed="fp32")]


def fsdp2_model_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """What of the model prevents it."""
    if model.quantized:
        return [problem("fsdp2-stored-weights", "hardware.strategy", how=model.quantized)]
    if spec.model.quantization.kind != "none" and structure_of(model).quantizable:
        return [problem("fsdp2-quantized-experts", "hardware.strategy")]
    if spec.model.adapter_path and adapts_experts(spec.model.adapter_path):
        return [problem("fsdp2-expert-adapter", "hardware.strategy")]
    return []
