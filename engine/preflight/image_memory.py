"""The memory that the images of a batch need: their pixels, and what a vision tower keeps for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.problems import Problem
from engine.core.stages import STAGES
from engine.models.adapters import ADAPTER_FILES
from engine.models.facts import ModelFacts
from engine.models.image_values import image_values
from engine.models.json_objects import json_object_or_empty
from engine.models.safetensors_headers import read_header
from engine.models.structure import LAYER_INDEX, structure_of
from engine.models.vision_parts import name_in_base
from engine.preflight.data_checks import images_per_row
from engine.spec.run_spec import RunSpec

# Bytes kept for the backward pass per input and output of a layer's matrices, in half precision: these themselves, and
# intermediate values.
ACTIVATION_BYTES = 2.75
COLOURS = 3
PIXEL_BYTES = 4  # as a processor makes them; a model in half precision adds a copy


@dataclass(frozen=True)
class Tower:
    """The layers of a vision tower: their number, the inputs and outputs of all their matrices, and the width between
    them. `patch`: pixels of a side; `frames`: how often an image is in its patches."""

    layers: int
    width: int
    hidden: int
    patch: int
    frames: int


def image_bytes(spec: RunSpec, model: ModelFacts, half: bool) -> float | None:
    """Bytes that the images of the largest batch need, according to the first rows of the data; 0 without images. None
    if it is not known how the model sees them."""
    sizes = images_per_row(spec) if structure_of(model).vision else ()
    if not sizes:
        return 0.0
    tower, row = tower_of(model), image_values(spec, sizes)
    if tower is None or row is None:
        return None
    copies = 2 if STAGES[spec.stage.kind].form == "pairs" else 1
    values = spec.training.per_device_train_batch_size * copies * row
    patches = math.ceil(values / (tower.frames * COLOURS * tower.patch**2))
    pixels = values * (PIXEL_BYTES + (2 if half else 0))
    return pixels + (_kept_bytes(spec, tower, patches, half) if learns_in_tower(spec, model) else 0.0)


def learns_in_tower(spec: RunSpec, model: ModelFacts) -> bool:
    """Whether weights of the vision tower are trained: as the spec says, or because the adapter that it continues has
    some there."""
    adapter = spec.model.adapter_path
    if spec.vision.tower != "frozen" or not adapter:
        return spec.vision.tower != "frozen"
    header, structure = read_header(Path(adapter) / ADAPTER_FILES[1]), structure_of(model)
    return not isinstance(header, Problem) and any(structure.part_of(name_in_base(name)) == "tower" for name in header)


def tower_of(model: ModelFacts) -> Tower | None:
    """The tower of a model that reads images, from its structure and config.json; None if either does not show it."""
    structure, config = structure_of(model), _vision_config(json_object_or_empty(model.path / "config.json"))
    patch = config.get("patch_size")
    patch = patch[0] if isinstance(patch, list) and patch else patch
    matrices = {
        name: shape
        for name, shape in structure.matrices().items()
        if structure.part_of(name) == "tower" and LAYER_INDEX.search(f".{name}.")
    }
    layers = {match[0] for name in matrices if (match := LAYER_INDEX.search(f".{name}."))}
    if not (matrices and isinstance(patch, int) and patch > 0):
        return None
    frames = config.get("temporal_patch_size")
    return Tower(
        layers=len(layers),
        width=sum(map(sum, matrices.values())),
        hidden=min(map(min, matrices.values())),
        patch=patch,
        frames=frames if isinstance(frames, int) else 1,
    )


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    parts = [value for key, value in config.items() if "vision" in key and isinstance(value, dict)]
    return parts[0] if parts else {}


def _kept_bytes(spec: RunSpec, tower: Tower, patches: int, half: bool) -> float:
    """As of the layers of the language part (`engine.preflight.memory`)."""
    kept = patches * tower.width / tower.layers * ACTIVATION_BYTES * (1 if half else 2)
    if not spec.training.gradient_checkpointing:
        return tower.layers * kept
    return patches * tower.layers * tower.hidden * (2 if half else 4) + kept
