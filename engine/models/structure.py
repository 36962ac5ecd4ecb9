"""The modules and parameters of a model as they are in memory, and what each of them is for.

For most families the safetensors headers are enough, since tensors are named like modules. For models that are built
differently (a vision tower next to the language part, experts in one tensor, state-space layers), a child process
builds the model without memory for its weights and lists its modules: `engine.worker.models.skeleton`, by the same
rules as training.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.core.problems import Problem, problem
from engine.models import child
from engine.models.facts import SCORER_CLASSES, ModelFacts
from engine.models.safetensors_headers import tensors_of

HEAD_MODULES = {"lm_head", "output", "output_layer", "score", "classifier", "v_head"}
COMMON_MATRICES = {
    "embed_tokens", "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "lm_head", "score",
}  # fmt: skip
ROUTER_MODULES = {"gate", "router"}  # plain parameters in transformers 5, although two-dimensional
ROUTED_EXPERT = re.compile(r"\.experts\.\d")  # transformers 5 stores routed experts as 3-D parameters
LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
Shape = tuple[int, ...]
ModelPart = Literal["language", "projector", "tower"]


def is_or_below(parameter: str, name: str) -> bool:
    """Whether `name` is the parameter, or a module that contains it; both are full names."""
    return parameter == name or parameter.startswith(f"{name}.")


@dataclass(frozen=True)
class Structure:
    """Full names throughout, as in `named_parameters` and `named_modules` of transformers' model."""

    shapes: Mapping[str, Shape]  # of every parameter; a tied head is not a parameter of its own
    linear: tuple[str, ...] = ()  # the modules that "all-linear" selects
    layers: tuple[str, ...] = ()  # the stack of layers of the language part, in order
    experts: tuple[str, ...] = ()  # parameters with a matrix for each routed expert: (experts, …, …)
    quantizable: tuple[str, ...] = ()  # those of them that can be loaded in 4 or 8 bits
    refused: tuple[str, ...] = ()  # linear layers on which an adapter would have no effect, or learn nothing
    towers: tuple[str, ...] = ()  # modules and parameters outside the language part: vision, audio, connectors
    vision: tuple[str, ...] = ()  # those of them that images pass through
    projectors: tuple[str, ...] = ()  # the modules in `vision` that turn features into inputs of the language part
    vision_linear: tuple[str, ...] = ()  # linear layers in `vision` on which an adapter works
    sharing: tuple[tuple[str, ...], ...] = ()  # linear layers that have one weight together, in groups
    writes: bool = True  # it generates text token by token
    shows_head: bool = True  # transformers can say which module computes the next token from the last hidden state
    recomputes: bool = True  # activations can be computed again in the backward pass, instead of being kept
    needs: str = ""  # arguments other than text that the model's forward pass requires
    missing: tuple[str, ...] = ()  # parameters that no file of the model has
    error: str = ""  # why transformers cannot build the model; the rest is then empty
    slow: bool = False  # it was not built in time; the rest is then empty

    def is_in_tower(self, name: str) -> bool:
        """Whether a module or parameter is outside the language part."""
        return any(is_or_below(name, tower) for tower in self.towers)

    def part_of(self, name: str) -> ModelPart | None:
        """The part with a module or parameter; None outside of all three, such as in an audio tower."""
        roots: dict[ModelPart | None, tuple[str, ...]]
        roots = {"projector": self.projectors, "tower": self.vision, None: self.towers}
        parts = (part for part, names in roots.items() if any(is_or_below(name, root) for root in names))
        return next(parts, "language")

    def matrices(self) -> dict[str, Shape]:
        """Modules that can have an adapter, with the shape of their weight: linear layers and embeddings."""
        matrices: dict[str, Shape] = {}
        for name, shape in self.shapes.items():
            module, _, kind = name.rpartition(".")
            router = module.rpartition(".")[2] in ROUTER_MODULES
            if kind == "weight" and len(shape) == 2 and not router and not ROUTED_EXPERT.search(module):
                matrices[module] = shape
        return matrices


def structure_of(model: ModelFacts) -> Structure:
    """The structure of the model in a folder; empty if its headers cannot be read, which `model_problems` reports."""
    tensors, problems = tensors_of(model.path)
    if problems or not tensors:
        return Structure({})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if is_named_otherwise(model, shapes) and not model.needs_remote_code:
        try:
            return _remembered.get(model.path) or _skeleton(model.path, *_stamp(model.path / "config.json"))
        except child.TooSlow:
            return Structure({}, slow=True)
    return structure_of_headers(shapes, tied=model.tied)


def remember(folder: Path, structure: Structure) -> None:
    """Use this as the structure of the model in `folder`: a process that has loaded the model need not start
    another."""
    _remembered[folder] = structure


_remembered: dict[Path, Structure] = {}


def structure_problems(model: ModelFacts, field: str) -> list[Problem]:
    """The problem that transformers cannot build the model, or that it cannot process text alone."""
    structure, architecture = structure_of(model), model.architecture or model.model_type
    scores = any(name in architecture for name in SCORER_CLASSES)  # it has another head than the one for text
    if structure.slow:
        return [problem("model-built-too-slowly", field, architecture=architecture, seconds=child.MAX_SECONDS)]
    if structure.error:
        return [problem("model-not-built", field, architecture=architecture, why=structure.error)]
    if not structure.writes:
        return [problem("model-not-language", field, architecture=architecture)]
    if missing := [name for name in structure.missing if not (scores and HEAD_MODULES.intersection(name.split(".")))]:
        return [problem("weights-missing", field, count=len(missing), name=missing[0])]
    if structure.needs:
        return [problem("model-needs-inputs", field, architecture=architecture, inputs=structure.needs)]
    if not structure.shows_head:
        return [problem("model-head-hidden", field, architecture=architecture)]
    return []


def is_named_otherwise(model: ModelFacts, shapes: Mapping[str, Shape]) -> bool:
    """Whether the names in the files may differ from those in memory, or do not show what a matrix is for: true except
    for a stack of layers whose matrices have the common names."""
    stacks = {name[: match.start(1)] for name in shapes if (match := LAYER_INDEX.search(name))}
    ends = {name.split(".")[-2] for name, shape in shapes.items() if len(shape) > 1 and "." in name}
    plain = all(len(shape) <= 2 for shape in shapes.values()) and ends <= COMMON_MATRICES
    # Others may be buffers, which are stored like parameters and never trained.
    plain = plain and all(name.endswith((".weight", ".bias")) for name in shapes)
    return not plain or model.has_towers or len(stacks) > 1


def structure_of_headers(shapes: Mapping[str, Shape], *, tied: bool) -> Structure:
    """The structure of a model whose tensors are named like its modules."""
    plain = Structure({name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")})
    linear = tuple(name for name in plain.matrices() if _is_usual_target(name))
    indices = {int(match[1]): name[: match.end(1)] for name in shapes if (match := LAYER_INDEX.search(name))}
    return Structure(plain.shapes, linear, layers=tuple(indices[index] for index in sorted(indices)))


def _is_usual_target(name: str) -> bool:
    end = name.rpartition(".")[2]
    return "emb" not in end and end not in HEAD_MODULES and end not in ("wte", "wpe")


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@child.remembered
def _skeleton(folder: Path, _modified: int, _size: int) -> Structure:
    try:
        return structure_from_json(child.ask("engine.worker.models.skeleton", str(folder.absolute())))
    except child.TooSlow:
        raise
    except child.NoAnswer as reason:
        return Structure({}, error=str(reason))


LISTS = (
    "linear",
    "layers",
    "experts",
    "quantizable",
    "refused",
    "towers",
    "vision",
    "projectors",
    "vision_linear",
    "missing",
)


def structure_as_json(structure: Structure) -> str:
    return json.dumps(vars(structure))


def structure_from_json(text: str) -> Structure:
    content: dict[str, Any] = json.loads(text)
    content |= {key: tuple(content[key]) for key in LISTS}
    content["shapes"] = {name: tuple(shape) for name, shape in content["shapes"].items()}
    content["sharing"] = tuple(map(tuple, content["sharing"]))
    return Structure(**content)
