"""Models that are converted once before they can be trained: GGUF files, and weights in pickle files; or quantized
weights, before they are quantized otherwise.

What there is to convert at a path, and where the result goes: a folder of safetensors beside it. A child does it, with
limits (`engine.worker.models.convert`), as a job (`engine.data.data_jobs`). Here nothing is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.core.problems import Refusal, problem
from engine.models.discovery import allowed_roots, hub_cache, is_below, locate
from engine.models.facts import inspect_model
from engine.models.json_objects import files_in, json_object_or_empty
from engine.models.quantized_weights import DEQUANTIZED, UNPACKED, can_be_unpacked, quantization_config
from engine.models.safetensors_headers import (
    GGUF_PART,
    NOT_WEIGHTS,
    PICKLE_SUFFIXES,
    gguf_files,
    gguf_parts,
    names_in_line,
)

MODEL_FIELD = "model.model_name_or_path"
CONFIG = "config.json"
INDEX = "pytorch_model.bin.index.json"  # where pickled weights are in several files


class Convertible(NamedTuple):
    """`file` contains the weights, or is the index of several files that do, or the config.json of quantized weights;
    `target` is the folder of the result. A GGUF model in several files is represented by the first of them."""

    file: Path
    target: Path

    @property
    def kind(self) -> str:
        if self.file.name != CONFIG:
            return "gguf" if self.file.suffix == ".gguf" else "pickle"
        return "packed" if inspect_model(self.file.parent).quantized in UNPACKED else "quantized"


def convertible(text: str, roots: Sequence[Path]) -> Convertible | None:
    """What is to be converted at a path, full or relative to a root; None where there is nothing. Raises Refusal where
    there are several files to choose from."""
    place = locate(text, roots) if text.strip() and text.isprintable() else None
    if place is None or not is_below(place, allowed_roots(roots)):
        return None
    if place.is_file():
        return _gguf(place, roots) if place.suffix == ".gguf" else None
    names = [name for name, _ in files_in(place)]
    if any(name.endswith(".safetensors") for name in names):
        method = inspect_model(place).quantized
        how = quantization_config(json_object_or_empty(place / CONFIG)) or {}
        quantized = CONFIG in names and (method in DEQUANTIZED or can_be_unpacked(method, how))
        return (
            Convertible(place / CONFIG, _target(place.name, place.parent, roots, "-dequantized")) if quantized else None
        )
    files = gguf_files(place) or (_pickled_files(names) if CONFIG in names else [])
    if len(files) > 1:
        raise Refusal(problem("convert-choose", MODEL_FIELD, folder=place, files=names_in_line(files, 12)))
    return Convertible(place / files[0], _target(place.name, place.parent, roots)) if files else None


def _gguf(file: Path, roots: Sequence[Path]) -> Convertible:
    """A GGUF file, or the first part of a model in several."""
    part = GGUF_PART.fullmatch(file.name)
    return Convertible(gguf_parts(file)[0], _target(part[1] if part else file.stem, file.parent, roots))


def offered(text: str, roots: Sequence[Path]) -> Convertible | None:
    """The same, and None too if there are several files to choose from, which the problems of the spec say."""
    try:
        return convertible(text, roots)
    except Refusal:
        return None


def _pickled_files(names: Sequence[str]) -> list[str]:
    usual = [name for name in (INDEX, "pytorch_model.bin") if name in names]
    others = [name for name in names if name.endswith(PICKLE_SUFFIXES) and name not in NOT_WEIGHTS]
    return usual[:1] or others


def _target(name: str, parent: Path, roots: Sequence[Path], suffix: str = "-safetensors") -> Path:
    """Beside what is converted; in the first model folder where that would not be found there."""
    cached = re.fullmatch(r"models--[^/]+?--([^/]+)", parent.parent.name)  # a hub's model in its cache
    name = f"{cached[1] if cached else name}{suffix}"
    real = [os.path.realpath(root) for root in roots]
    beside = is_below(parent, real) and not is_below(parent, [os.path.realpath(hub_cache())])
    if beside or not roots:
        return parent / name
    # A root may be a model itself, in whose folder nobody looks for others.
    return next((root for root in roots if not (root / CONFIG).exists()), roots[0]) / name
