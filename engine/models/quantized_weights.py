"""Models whose weights are quantized on disk: how each kind is loaded, and what keeps the others from being trained.

What is dequantized is a plain model in memory, whatever becomes of it then: it is trained by any method, merged and
exported as one. transformers would load some of the kinds that are refused here, too: without their scales.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Problem, problem
from engine.models.safetensors_headers import Tensor

TRAINED_AS_THEY_ARE = ("bitsandbytes",)  # under an adapter
DEQUANTIZED = ("fp8", "mxfp4", "compressed-tensors")  # while they are loaded
READERS = {"compressed-tensors": ("compressed_tensors",)}  # kind → modules that read it
# Kinds that older tools wrote down in a file of their own.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config")  # where vision-language models keep theirs
# What compressed-tensors calls the ways of storing weights that are undone rightly.
COMPRESSED_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
# What hubs call a quantized release beside the plain one: Qwen3-8B-FP8, Qwen2.5-7B-Instruct-GPTQ-Int4.
RELEASE_SUFFIX = re.compile(
    r"(?i)([-_.](?:awq|gptq|int[48]|[48]bit|w\d+a\d+|fp8|dynamic|nvfp4|mxfp4|quantized|g\d+))+$"
)
BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\n\s*-\s*)?[\"']?([\w.][\w./-]*)", re.MULTILINE)


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of quantized weights, of the model or of its language part."""
    parts = (config, *(config.get(key) for key in TEXT_CONFIG_KEYS))
    for part in parts:
        if isinstance(part, dict) and isinstance(how := part.get("quantization_config"), dict):
            return how
    return None


def quantization_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The kind of quantized weights in a folder, "?" where it is not named; None where nothing says that they are."""
    how = quantization_config(config)
    if how is not None:
        if bitsandbytes_kind(how):
            return "bitsandbytes"  # its first releases did not name themselves
        method = how.get("quant_method")
        return method if isinstance(method, str) and method else "?"
    return next((kind for name, kind in FILES.items() if os.path.isfile(folder / name)), None)


def bitsandbytes_kind(how: Mapping[str, Any] | None) -> str:
    """ "4bit" or "8bit" for weights that bitsandbytes has quantized; "" for others."""
    return next((bits for bits in ("4bit", "8bit") if how and how.get(f"load_in_{bits}")), "")


def quantization_problems(
    folder: Path, method: str | None, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Problem]:
    """That weights are quantized in a way that cannot be loaded rightly, with the release to choose instead."""
    if method is None:
        return _undeclared_problems(folder, tensors)
    if method in TRAINED_AS_THEY_ARE:
        return []
    kind = _unsupported_scheme(quantization_config(config) or {}) if method == "compressed-tensors" else ""
    if method in DEQUANTIZED and not kind:
        return []
    how = " ".join(filter(None, (method, kind)))
    if plain := plain_release(folder):
        return [problem("model-quantized-of", how=how, plain=plain)]
    return [problem("model-quantized", how=how)]


def _undeclared_problems(folder: Path, tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Weights of a type that nothing says how to read: transformers would take them for the numbers they are not."""
    for name, tensor in tensors.items():
        packed = name.endswith((".qweight", "_packed", ".weight", "_proj")) and tensor.dtype not in PLAIN_DTYPES
        if packed or tensor.dtype.startswith("F8"):
            return [problem("model-quantized-undeclared", folder=folder.name, name=name, dtype=tensor.dtype)]
    return []


def _unsupported_scheme(how: Mapping[str, Any]) -> str:
    """What of compressed-tensors transformers does not undo, or undoes wrongly; "" for what it does right.

    It takes one scheme for all matrices outside experts, and leaves an order of columns and sparsity out of account.
    """
    groups = _mapping(how.get("config_groups")).values()
    schemes = [_mapping(_mapping(group).get("weights")) for group in groups]
    formats = [str(_mapping(group).get("format") or how.get("format")) for group in groups]
    sparsity = _mapping(how.get("sparsity_config"))
    if not formats or formats[0] not in COMPRESSED_FORMATS:
        return str(how.get("format") or "?")
    if any(scheme != schemes[0] for scheme in schemes) or len(set(formats)) > 1:
        return "mixed-precision"
    if schemes[0].get("actorder") in ("group", "dynamic", True):
        return "actorder"
    if how.get("transform_config"):
        return "transformed"
    return "sparse" if sparsity.get("format", "dense") != "dense" else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def plain_release(folder: Path) -> str:
    """What the model is called that a quantized release was made from: by its card, else by its own name; "" where
    neither tells."""
    with contextlib.suppress(OSError):
        card = regular_files.read_bytes(folder / "README.md").decode("utf-8", "replace")
        if card.startswith("---") and (match := BASE_MODEL.search(card.partition("\n---")[0])):
            return match[1]
    cached = re.search(r"models--[^/]+?--([^/]+)/snapshots/[^/]+$", str(folder))
    name = cached[1] if cached else folder.name
    plain = RELEASE_SUFFIX.sub("", name)
    return plain if plain != name else ""
