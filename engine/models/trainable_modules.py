"""What a method trains in a model: the modules LoRA can target, the layers
freeze keeps, and how many parameters that is.

Read from the safetensors headers, by peft's own rules.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from engine.core.problems import Problem, problem
from engine.models.facts import ModelFacts
from engine.models.safetensors_headers import Tensor, names_in_line, tensors_of

ALL_LINEAR = "all-linear"
HEAD_MODULES = {"lm_head", "output", "output_layer", "score", "classifier", "v_head"}
ROUTER_MODULES = {"gate", "router"}  # plain parameters in transformers 5, although two-dimensional
ROUTED_EXPERT = re.compile(r"\.experts\.\d")  # transformers 5 fuses routed experts into 3-D parameters
LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
CONV1D_FAMILIES = {"gpt2", "openai-gpt", "gpt-sw3"}  # keep their linear weights as (in, out)


def module_names(model: ModelFacts) -> list[str]:
    """Full names of all modules that hold weights, containers included: model.layers.0.mlp, …mlp.up_proj."""
    return _module_names(_tensors(model))


def _module_names(tensors: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        names.update((".".join(parts[:end]), None) for end in range(1, len(parts) + 1))
    return list(names)


def linear_modules(model: ModelFacts) -> list[str]:
    """Short names of what LoRA is usually put on: q_proj, k_proj, …; no embeddings, heads or routers."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _linear_names(model)))


def fully_trainable_modules(model: ModelFacts) -> list[str]:
    """Short names of what is usually trained in full beside LoRA: embeddings and the head."""
    linear = set(_linear_names(model))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in weight_matrices(model) if name not in linear))


def lora_problems(
    model: ModelFacts,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    part: str = "method",
) -> list[Problem]:
    """Names that peft would not find in the model; fields are `part`.target_modules and `part`.modules_to_save.
    Returns [] where the headers cannot be read: `model_problems` speaks of that."""
    linear = linear_modules(model)
    if not linear:
        return []
    problems, named = [], list(weight_matrices(model))
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        pattern = isinstance(target_modules, str) and target != ALL_LINEAR
        try:
            missing = target != ALL_LINEAR and not any(_matches(target, name, pattern) for name in named)
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
    names = module_names(model)
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for saved in modules_to_save:
        if not any(name.endswith(saved) for name in names):
            near = difflib.get_close_matches(saved, ends, n=1, cutoff=0.0)
            problems.append(problem("lora-saved-missing", f"{part}.modules_to_save", given=saved, nearest=near[0]))
    return problems


def freeze_problems(
    model: ModelFacts, trainable_modules: Sequence[str], field: str = "method.trainable_modules"
) -> list[Problem]:
    """Names that are of no parameter and of no module. Returns [] where the headers cannot be read."""
    names = list(_parameter_counts(model))
    unknown = [module for module in trainable_modules if not any(is_or_below(name, module) for name in names)]
    known = _module_names(name for name in names if not ROUTED_EXPERT.search(name))
    return [
        problem("freeze-unknown", field, given=module, nearest=difflib.get_close_matches(module, known, 1, 0.0)[0])
        for module in unknown
        if known
    ]


def is_or_below(parameter: str, name: str) -> bool:
    """Whether `name` names the parameter, or a module that it is in: both are full names."""
    return parameter == name or parameter.startswith(f"{name}.")


def trained_layers(layers: int, count: int) -> range:
    """Indices of the last `count` of so many layers; of a negative count those of the first."""
    return range(max(layers - count, 0), layers) if count > 0 else range(min(-count, layers))


def trainable_parameters(
    model: ModelFacts,
    method: str,
    *,
    r: int = 16,
    target_modules: str | Sequence[str] = (ALL_LINEAR,),
    modules_to_save: Sequence[str] = (),
    use_dora: bool = False,
    trainable_layers: int = 2,
    trainable_modules: Sequence[str] = (),
    scorer: bool = False,
) -> int:
    """How many weights `method` ("full", "freeze" or "lora") trains, as peft would count them: LoRA has
    r × (in + out) per matrix (Hu et al. 2021), DoRA one magnitude per output more (Liu et al. 2024).
    A `scorer` has one score in place of the output head. 0 where the headers cannot be read. Raises KeyError for
    another method."""
    sizes, score = _parameter_counts(model), 0
    if scorer and sizes:
        sizes = {name: size for name, size in sizes.items() if HEAD_MODULES.isdisjoint(name.split(".")[:-1])}
        score = model.hidden_size or 0

    def full() -> int:
        return sum(sizes.values())

    def freeze() -> int:
        if trainable_modules:
            return sum(
                size for name, size in sizes.items() if any(is_or_below(name, module) for module in trainable_modules)
            )
        layer = {name: int(match[1]) for name in sizes if (match := LAYER_INDEX.search(name))}
        trained = trained_layers(len(set(layer.values())), trainable_layers)
        return sum(sizes[name] for name, number in layer.items() if number in trained)

    def lora() -> int:
        whole = {name: math.prod(tensor.shape) for name, tensor in _tensors(model).items()}
        saved = sum(size for name, size in whole.items() if _is_saved(name, modules_to_save))
        out = 1 if model.model_type in CONV1D_FAMILIES else 0
        return saved + sum(
            r * sum(shape) + (shape[out] if use_dora else 0)
            for shape in targeted_shapes(model, target_modules, modules_to_save)
        )

    return {"full": full, "freeze": freeze, "lora": lora}[method]() + score


def _tensors(model: ModelFacts) -> Mapping[str, Tensor]:
    """All tensors by name. A tied head is not in the file, yet it is a module that can be named."""
    tensors, _ = tensors_of(model.path)
    embedding = next((name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))), "")
    if model.tied and embedding and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors[embedding]
    return tensors


def _parameter_counts(model: ModelFacts) -> dict[str, int]:
    """Size of every parameter by name; a tied head is no parameter of its own."""
    head = "lm_head.weight" if model.tied else ""
    return {name: math.prod(tensor.shape) for name, tensor in _tensors(model).items() if name != head}


def weight_matrices(model: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Modules that peft can put an adapter on, with the shape of their weight: linear layers and embeddings."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in _tensors(model).items():
        module, _, kind = name.rpartition(".")
        router = module.rpartition(".")[2] in ROUTER_MODULES
        if kind == "weight" and len(tensor.shape) == 2 and not router and not ROUTED_EXPERT.search(module):
            shapes[module] = tensor.shape
    return shapes


def _linear_names(model: ModelFacts) -> list[str]:
    ends = {name: name.rpartition(".")[2] for name in weight_matrices(model)}
    return [
        name for name, end in ends.items() if "emb" not in end and end not in HEAD_MODULES and end not in ("wte", "wpe")
    ]


def targeted_shapes(model: ModelFacts, targets: str | Sequence[str], saved: Sequence[str]) -> list[tuple[int, ...]]:
    """Shapes of the matrices that LoRA is put on; [] where the headers cannot be read."""
    pattern = isinstance(targets, str) and targets != ALL_LINEAR
    targets = [targets] if isinstance(targets, str) else targets
    chosen = set(_linear_names(model)) if ALL_LINEAR in targets else set()
    return [
        shape
        for name, shape in weight_matrices(model).items()
        if (name in chosen or any(_matches(target, name, pattern) for target in targets))
        and not any(_is_inside(f"{name}.weight", module) for module in saved)
    ]


def _matches(target: str, module: str, pattern: bool) -> bool:
    """peft's rule: one string is a pattern for the whole name, names in a list are the name or its end."""
    return bool(re.fullmatch(target, module)) if pattern else module == target or module.endswith(f".{target}")


def _is_inside(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module, or to one inside it; `module` is a full name or the end of one."""
    return f".{module}." in f".{tensor}"


def _is_saved(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """peft wraps every module whose full name ends with the given one, with or without a dot before it."""
    parts = tensor.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules_to_save)) for end in range(1, len(parts)))
