"""What a spec trains of vision tower and projector: their adapters, and the modules trained in full."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engine.core.problems import Problem, problem
from engine.models.facts import ModelFacts
from engine.models.structure import ModelPart, Shape, Structure, is_or_below, structure_of
from engine.spec.vision_settings import Vision

Training = Literal["frozen", "adapter", "trained"]


@dataclass(frozen=True)
class VisionPlan:
    """`adapters`: the linear layers with LoRA. `whole`: the largest modules of which all weights are trained, as peft
    can save them. `parameters`: all parameters that are trained, as full fine-tuning can. `language`: whether the
    method applies to the language part."""

    adapters: Mapping[str, Shape]
    whole: tuple[str, ...]
    parameters: frozenset[str]
    language: bool = True

    def trained(self, method: str) -> list[str]:
        """The parameters trained in full: with LoRA only those of modules, which peft saves next to the adapter."""
        if method != "lora":
            return list(self.parameters)
        return [name for name in self.parameters if any(is_or_below(name, module) for module in self.whole)]


NO_VISION = VisionPlan({}, (), frozenset())


def vision_plan(structure: Structure, vision: Vision) -> VisionPlan:
    """What a spec trains of a model with this structure."""
    chosen: dict[ModelPart, Training] = {"tower": vision.tower, "projector": vision.projector}

    def is_chosen(name: str, training: Training) -> bool:
        part = structure.part_of(name)
        return part is not None and chosen.get(part) == training

    parameters = frozenset(name for name in structure.shapes if is_chosen(name, "trained"))
    matrices = structure.matrices()
    adapters = {name: matrices[name] for name in structure.vision_linear if is_chosen(name, "adapter")}
    return VisionPlan(adapters, _largest_modules(structure, parameters), parameters, vision.language_part == "method")


def _largest_modules(structure: Structure, parameters: frozenset[str]) -> tuple[str, ...]:
    """The largest modules of which all parameters are among these; none is a list of modules, which has no forward pass
    that peft could replace."""
    if not parameters:
        return ()
    below: dict[str, list[str]] = {}
    children: dict[str, set[str]] = {}
    for name in structure.shapes:
        steps = name.split(".")[:-1]
        for end in range(1, len(steps) + 1):
            below.setdefault(".".join(steps[:end]), []).append(name)
            if end < len(steps):
                children.setdefault(".".join(steps[:end]), set()).add(steps[end])
    largest: list[str] = []
    for module in sorted(below, key=lambda name: name.count(".")):
        is_list = module in children and all(child.isdigit() for child in children[module])
        covered = any(module.startswith(f"{larger}.") for larger in largest)
        if not is_list and not covered and parameters.issuperset(below[module]):
            largest.append(module)
    return tuple(largest)


def name_in_base(parameter: str) -> str:
    """The name of a parameter, or of the module that peft has adapted, in the model without an adapter."""
    return re.sub(r"^base_model\.model\.|\.(modules_to_save|original_module)(\.default)?(?=\.)", "", parameter)


def vision_problems(model: ModelFacts, vision: Vision, method: str) -> list[Problem]:
    """Choices for parts that the model does not have, or of which nothing can be trained as chosen. Returns [] if the
    headers cannot be read."""
    structure = structure_of(model)
    if not vision.first_change or not structure.shapes:
        return []
    if not structure.vision:
        return [
            problem("no-vision", f"vision.{vision.first_change}", architecture=model.architecture or model.model_type)
        ]
    if vision.projector != "frozen" and not structure.projectors:
        return [problem("no-projector", "vision.projector", architecture=model.architecture or model.model_type)]
    plan = vision_plan(structure, vision)
    for part in ("tower", "projector"):
        training = getattr(vision, part)
        names = plan.adapters if training == "adapter" else plan.trained(method)
        if training != "frozen" and not any(structure.part_of(name) == part for name in names):
            code = "vision-nothing-adapted" if training == "adapter" else "vision-nothing-trained"
            return [problem(code, f"vision.{part}")]
    return []
