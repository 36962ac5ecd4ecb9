"""What prevents a training from dividing its weights with FSDP2: in its settings, and in the model."""

from __future__ import annotations

from engine.core.problems import Problem, problem
from engine.models.adapters import adapts_experts
from engine.models.facts import ModelFacts
from engine.models.structure import structure_of
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import fsdp2_problems


def fsdp2_obstacles(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Everything that prevents it."""
    return fsdp2_problems(spec) + fsdp2_model_problems(spec, model)


def fsdp2_model_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """What of the model prevents it."""
    if model.quantized:
        return [problem("fsdp2-stored-weights", "hardware.strategy", how=model.quantized)]
    if spec.model.quantization.kind != "none" and structure_of(model).quantizable:
        return [problem("fsdp2-quantized-experts", "hardware.strategy")]
    if spec.model.adapter_path and adapts_experts(spec.model.adapter_path):
        return [problem("fsdp2-expert-adapter", "hardware.strategy")]
    return []
