"""Models whose weights are quantized on disk: how each kind is loaded, and why the others cannot be trained.

A dequantized model is a plain model in memory: it can be trained with any method, merged and exported like others.
transformers would load some of the rejected kinds, too, but without their scales.
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

TRAINED_AS_THEY_ARE = ("bitsandbytes",)  # with an adapter
DEQUANTIZED = ("fp8", "mxfp4", "compressed-tensors")  # while they are loaded
UNPACKED = ("gptq", "awq")  # by a conversion, once
READERS = {"compressed-tensors": ("compressed_tensors",)}  # kind → modules that read it
# Separate files in which older tools recorded the kind.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config")  # the language part in vision-language models
# compressed-tensors' storage formats that are dequantized correctly.
COMPRESSED_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
# Suffixes with which hubs name quantized releases: Qwen3-8B-FP8, Qwen2.5-7B-Instruct-GPTQ-Int4.
RELEASE_SUFFIX = re.compile(
    r"(?i)([-_.](?:awq|gptq|int[48]|[48]bit|w\d+a\d+|fp8|dynamic|nvfp4|mxfp4|quantized|g\d+))+$"
)
BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\n\s*-\s*)?[\"']?([\w.][\w./-]*)", re.MULTILINE)


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization settings in config.json, of the model or of its language part."""
    parts = (config, *(config.get(key) for key in TEXT_CONFIG_KEYS))
    for part in parts:
        if isinstance(part, dict) and isinstance(how := part.get("quantization_config"), dict):
            return how
    return None


def quantization_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The kind of quantized weights in a folder, "?" if it is not named; None if nothing indicates quantized
    weights."""
    how = quantization_config(config)
    if how is not None:
        if bitsandbytes_kind(how):
            return "bitsandbytes"  # its first releases did not name themselves
        method = how.get("quant_method")
        return method if isinstance(method, str) and method else "?"
    return next((kind for name, kind in FILES.items() if os.path.isfile(folder / name)), None)


def bitsandbytes_kind(how: Mapping[str, Any] | None) -> str:
    """ "4bit" or "8bit" for weights quantized by bitsandbytes, otherwise ""."""
    return next((bits for bits in ("4bit", "8bit") if how and how.get(f"load_in_{bits}")), "")


def quantization_problems(
    folder: Path, method: str | None, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Problem]:
    """A problem if the weights are quantized in a way that cannot be loaded correctly, with the release to choose
    instead."""
    if method is None:
        return _undeclared_problems(folder, tensors)
    if method in TRAINED_AS_THEY_ARE:
        return []
    kind = _unsupported_scheme(quantization_config(config) or {}) if method == "compressed-tensors" else ""
    if method in DEQUANTIZED and not kind:
        return []
    if can_be_unpacked(method, quantization_config(config) or {}):
        return [problem("model-quantized-convert", how=method, path=folder, plain=plain_release(folder) or "—")]
    how = " ".join(filter(None, (method, kind)))
    if plain := plain_release(folder):
        return [problem("model-quantized-of", how=how, plain=plain)]
    return [problem("model-quantized", how=how)]


def can_be_unpacked(method: str | None, how: Mapping[str, Any]) -> bool:
    """Whether a conversion knows how the weights are packed."""
    if method == "gptq":
        formats = ("gptq", "gptq_v2")
        whole = isinstance(how.get("group_size"), int)
        return how.get("bits") in (2, 4, 8) and whole and how.get("checkpoint_format", "gptq") in formats
    return method == "awq" and how.get("bits") == 4 and str(how.get("version", "gemm")).lower() == "gemm"


def _undeclared_problems(folder: Path, tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Weights of a type without a quantization config: transformers would misread them as plain numbers."""
    for name, tensor in tensors.items():
        packed = name.endswith((".qweight", "_packed", ".weight", "_proj")) and tensor.dtype not in PLAIN_DTYPES
        if packed or tensor.dtype.startswith("F8"):
            return [problem("model-quantized-undeclared", folder=folder.name, name=name, dtype=tensor.dtype)]
    return []


def _unsupported_scheme(how: Mapping[str, Any]) -> str:
    """The feature of compressed-tensors that transformers does not dequantize, or not correctly; "" if there is none.

    It applies one scheme to all matrices outside experts, and ignores column order and sparsity.
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
    """The name of the model that a quantized release was made from, according to its card or else its own name; "" if
    unknown."""
    with contextlib.suppress(OSError):
        card = regular_files.read_bytes(folder / "README.md").decode("utf-8", "replace")
        if card.startswith("---") and (match := BASE_MODEL.search(card.partition("\n---")[0])):
            return match[1]
    cached = re.search(r"models--[^/]+?--([^/]+)/snapshots/[^/]+$", str(folder))
    name = cached[1] if cached else folder.name
    plain = RELEASE_SUFFIX.sub("", name)
    return plain if plain != name else ""
