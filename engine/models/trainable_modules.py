"""What a method trains in a model: the modules that LoRA can target, the layers that freeze trains, and their parameter
counts.

It follows peft's own rules, on the structure of the model (`engine.models.structure`). Parts other than the language
part (a vision tower, its projector) are trained as `engine.models.vision_parts` says, or if they are named in full.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from engine.core.problems import Problem, problem
from engine.models.facts import ModelFacts
from engine.models.safetensors_headers import names_in_line
from engine.models.structure import (
    HEAD_MODULES,
    ROUTED_EXPERT,
    Shape,
    Structure,
    is_or_below,
    structure_of,
)
from engine.models.vision_parts import NO_VISION, VisionPlan
from engine.spec.vision_settings import Vision

ALL_LINEAR = "all-linear"
CONV1D_FAMILIES = {"gpt2", "openai-gpt", "gpt-sw3"}  # store their linear weights as (in, out)


def module_names(model: ModelFacts) -> list[str]:
    """Full names of all modules with weights, including containers: model.layers.0.mlp, …mlp.up_proj."""
    return _module_names(_named_shapes(model))


def _module_names(tensors: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        names.update((".".join(parts[:end]), None) for end in range(1, len(parts) + 1))
    return list(names)


def linear_modules(model: ModelFacts) -> list[str]:
    """Short names of the usual LoRA targets: q_proj, k_proj, …; no embeddings, heads or routers."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in structure_of(model).linear))


def fully_trainable_modules(model: ModelFacts) -> list[str]:
    """Short names of what is usually trained in full next to LoRA: embeddings and the head."""
    linear = set(structure_of(model).linear)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in weight_matrices(model) if name not in linear))


def lora_problems(
    model: ModelFacts,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    part: str = "method",
) -> list[Problem]:
    """Names that peft would not find in the model; fields are `part`.target_modules and `part`.modules_to_save. Returns
    [] if the headers cannot be read, which `model_problems` reports."""
    linear = linear_modules(model)
    if not linear:
        # If there is nothing at all, the headers cannot be read.
        return [problem("lora-no-linear", f"{part}.target_modules")] if structure_of(model).shapes else []
    problems, structure = [], _with_tied_head(model)
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        pattern = isinstance(target_modules, str) and target != ALL_LINEAR
        try:
            missing = not targeted_modules(structure, target if pattern else [target])
        except re.error as error:
            problems.append(problem("lora-pattern-broken", f"{part}.target_modules", given=target, what=error.msg))
            continue
        if missing:
            near = difflib.get_close_matches(target, linear, n=1, cutoff=0.0)
            problems.append(
                problem(
                    "lora-target-missing",
                    f"{part}.target_modules",
                    given=target,
                    nearest=near[0],
                    modules=names_in_line(linear, 12),
                )
            )
    if refused := _refused_targets(structure, target_modules):
        problems.append(problem("lora-target-refused", f"{part}.target_modules", given=names_in_line(refused)))
    names = module_names(model)
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for saved in modules_to_save:
        if not any(name.endswith(saved) for name in names):
            near = difflib.get_close_matches(saved, ends, n=1, cutoff=0.0)
            problems.append(problem("lora-saved-missing", f"{part}.modules_to_save", given=saved, nearest=near[0]))
    return problems


def _refused_targets(structure: Structure, target_modules: str | Sequence[str]) -> list[str]:
    """Short names of targets that peft would not adapt, or not as the modules they are."""
    if target_modules == ALL_LINEAR:
        return []
    chosen = (
        target_modules if isinstance(target_modules, str) else [name for name in target_modules if name != ALL_LINEAR]
    )
    with contextlib.suppress(re.error):  # which has been reported
        names = targeted_modules(structure, chosen) if chosen else {}
        return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name in structure.refused))
    return []


def freeze_problems(
    model: ModelFacts, trainable_modules: Sequence[str], field: str = "method.trainable_modules"
) -> list[Problem]:
    """Names that match no parameter and no module, or a model without a list of layers if none is named. Returns [] if
    the headers cannot be read."""
    structure = structure_of(model)
    names = list(structure.shapes)
    if names and not structure.layers and not trainable_modules:
        return [problem("freeze-no-layers", "method.trainable_layers", architecture=model.architecture)]
    unknown = [module for module in trainable_modules if not any(is_or_below(name, module) for name in names)]
    known = _module_names(name for name in names if not ROUTED_EXPERT.search(name))
    return [
        problem("freeze-unknown", field, given=module, nearest=difflib.get_close_matches(module, known, 1, 0.0)[0])
        for module in unknown
        if known
    ]


def chosen_layers(structure: Structure, count: int) -> tuple[str, ...]:
    """Names of the last `count` layers, or of the first ones for a negative count."""
    return structure.layers[-count:] if count > 0 else structure.layers[:-count]


def trainable_parameters(
    model: ModelFacts,
    method: str,
    *,
    r: int = 16,
    target_modules: str | Sequence[str] = (ALL_LINEAR,),
    modules_to_save: Sequence[str] = (),
    use_dora: bool = False,
    expert_r: int | None = None,
    trainable_layers: int = 2,
    trainable_modules: Sequence[str] = (),
    scorer: bool = False,
    vision: VisionPlan = NO_VISION,
) -> int:
    """The number of weights that `method` ("full", "freeze" or "lora") trains, as peft would count them: LoRA has r ×
    (in + out) per matrix (Hu et al. 2021), `expert_r` × (in + out) per matrix of an expert, DoRA one more magnitude per
    output (Liu et al. 2024). A `scorer` has one score in place of the output head. `vision`: what is trained beside the
    language part, or instead of it. 0 if the headers cannot be read. Raises KeyError for another method."""
    structure, score = structure_of(model), 0
    sizes = {name: math.prod(shape) for name, shape in structure.shapes.items() if not structure.is_in_tower(name)}
    if scorer and sizes:
        sizes = {name: size for name, size in sizes.items() if HEAD_MODULES.isdisjoint(name.split(".")[:-1])}
        score = model.hidden_size or 0

    def full() -> int:
        return sum(sizes.values()) if vision.language else 0

    def freeze() -> int:
        if not vision.language:
            return 0
        if trainable_modules:
            return sum(
                math.prod(shape)
                for name, shape in structure.shapes.items()
                if any(is_or_below(name, module) for module in trainable_modules) and name not in vision.parameters
            )
        chosen = tuple(f"{layer}." for layer in chosen_layers(structure, trainable_layers))
        return sum(size for name, size in sizes.items() if name.startswith(chosen))

    def lora() -> int:
        whole = _named_shapes(model)
        saved = sum(math.prod(shape) for name, shape in whole.items() if _is_saved(name, modules_to_save))
        out = 1 if model.model_type in CONV1D_FAMILIES else 0
        experts = (structure.shapes[name] for name in structure.experts if expert_r and vision.language)
        saved += sum((expert_r or 0) * math.prod(shape[:-2]) * sum(shape[-2:]) for shape in experts)
        return saved + sum(
            r * sum(shape) + (shape[out] if use_dora else 0)
            for shape in adapter_targets(model, target_modules, modules_to_save, vision).values()
        )

    beside = sum(math.prod(structure.shapes[name]) for name in vision.trained(method))
    return {"full": full, "freeze": freeze, "lora": lora}[method]() + beside + score


def saved_part_problems(model: ModelFacts, vision: Vision, modules_to_save: Sequence[str]) -> list[Problem]:
    """Modules to be trained in full that belong to a vision part which has a setting of its own, and would be counted
    and wrapped twice."""
    structure = structure_of(model)
    chosen = {part for part in ("tower", "projector") if getattr(vision, part) != "frozen"}
    twice = [
        saved
        for saved in modules_to_save
        if any(structure.part_of(name) in chosen and _is_saved(name, [saved]) for name in structure.shapes)
    ]
    return [problem("vision-saved-twice", "method.modules_to_save", names=", ".join(twice))] if twice else []


def _with_tied_head(model: ModelFacts) -> Structure:
    """The structure with a tied head as a parameter of its own, since it is a module that can be named."""
    structure = structure_of(model)
    ends = ("embed_tokens.weight", "wte.weight")
    embedding = next((name for name in structure.shapes if name.endswith(ends) and not structure.is_in_tower(name)), "")
    if not (model.tied and embedding) or "lm_head.weight" in structure.shapes:
        return structure
    return replace(structure, shapes={**structure.shapes, "lm_head.weight": structure.shapes[embedding]})


def _named_shapes(model: ModelFacts) -> Mapping[str, Shape]:
    return _with_tied_head(model).shapes


def weight_matrices(model: ModelFacts) -> dict[str, Shape]:
    """Modules of the language part that can have a peft adapter, with the shape of their weight: linear layers and
    embeddings."""
    structure = _with_tied_head(model)
    return {name: shape for name, shape in structure.matrices().items() if not structure.is_in_tower(name)}


def targeted_modules(structure: Structure, targets: str | Sequence[str], saved: Sequence[str] = ()) -> dict[str, Shape]:
    """The matrices with LoRA, by full name. A single text other than "all-linear" is a pattern for the whole name; a
    list has names or their ends, and refers to the language part, except for full names."""
    pattern = isinstance(targets, str) and targets != ALL_LINEAR
    names = [targets] if isinstance(targets, str) else targets
    usual = set(structure.linear) if ALL_LINEAR in names else set()

    def is_meant(module: str) -> bool:
        if pattern:
            return re.fullmatch(names[0], module) is not None
        end_counts = not structure.is_in_tower(module)
        return module in usual or any(
            module == target or (end_counts and module.endswith(f".{target}")) for target in names
        )

    return {
        name: shape
        for name, shape in structure.matrices().items()
        if is_meant(name) and not any(_is_inside(f"{name}.weight", module) for module in saved)
    }


def adapter_targets(
    model: ModelFacts, targets: str | Sequence[str], saved: Sequence[str], vision: VisionPlan = NO_VISION
) -> dict[str, Shape]:
    """The matrices with LoRA, by full name; empty if the headers cannot be read."""
    language = targeted_modules(_with_tied_head(model), targets, saved) if vision.language else {}
    return {**language, **vision.adapters}


def _is_inside(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module, or to one inside it; `module` is a full name or the end of one."""
    return f".{module}." in f".{tensor}"


def _is_saved(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """peft wraps every module whose full name ends with the given one, with or without a dot before it."""
    parts = tensor.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules_to_save)) for end in range(1, len(parts)))
