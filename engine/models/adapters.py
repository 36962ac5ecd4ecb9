"""Facts about the folder of a LoRA adapter, and what prevents training it further."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.models.discovery import identity
from engine.models.facts import as_text
from engine.models.json_objects import read_json_object
from engine.models.safetensors_headers import read_header

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter's adapter_config.json; empty if it cannot be read, or a rank in it is not a number."""
    config = read_json_object(Path(folder) / ADAPTER_FILES[0])
    if isinstance(config, Problem):
        return {}
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r") or 0, *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    return config if all(isinstance(rank, int) for rank in ranks) else {}


def adapter_problems(
    folder: str | Path,
    base: str,
    settings: Mapping[str, Any],
    field: str = "model.adapter_path",
    *,
    scorer: bool = False,
) -> list[Problem]:
    """What prevents training a LoRA adapter further: missing files, another base than `base`, a reward model's adapter
    unless `scorer`, and `settings` (name in peft's LoraConfig → value) that differ from the adapter's, each at
    "method." and its name."""
    folder = Path(folder)
    for name in ADAPTER_FILES:
        if not os.path.isfile(folder / name):
            return [problem("adapter-file-missing", field, file=name, folder=folder)]
    config, weights = read_json_object(folder / ADAPTER_FILES[0]), read_header(folder / ADAPTER_FILES[1])
    broken = [replace(part, field=field) for part in (config, weights) if isinstance(part, Problem)]
    if isinstance(config, Problem) or broken:
        return broken
    problems = []
    trained_on = as_text(config.get("base_model_name_or_path"))
    if not _same_base(trained_on, base):
        problems.append(problem("adapter-other-base", field, base=trained_on or "?", model=base))
    if _has_score_head(config) and not scorer:
        problems.append(problem("adapter-scores", field, folder=folder))
    return problems + [
        problem("adapter-differs", f"method.{name}", given=value, adapter=config[name])
        for name, value in settings.items()
        if name in config and config[name] != value
    ]


def adapter_has_score_head(folder: str | Path) -> bool:
    """Whether an adapter has the head of a reward model."""
    config = read_json_object(Path(folder) / ADAPTER_FILES[0])
    return not isinstance(config, Problem) and _has_score_head(config)


def adapts_experts(folder: str | Path) -> bool:
    """Whether an adapter is on tensors that hold several experts, for which peft has no dropout."""
    config = read_json_object(Path(folder) / ADAPTER_FILES[0])
    return not isinstance(config, Problem) and bool(config.get("target_parameters"))


def _has_score_head(config: Mapping[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_CLS"


def _same_base(trained_on: str, chosen: str) -> bool:
    """A base that is not on this machine under its original name is identified by the last part of that name."""
    base_identity, model_identity = identity(trained_on), identity(chosen)
    moved = not os.path.exists(trained_on) and Path(base_identity).name == Path(model_identity).name
    return base_identity == model_identity or moved


def adapter_embedding_rows(folder: str | Path) -> int:
    """The number of token ids for which an adapter has its own embeddings; 0 if it uses those of the base."""
    weights = read_header(Path(folder) / ADAPTER_FILES[1])
    names = (
        "embed_tokens.weight",
        "wte.weight",
        "embed_in.weight",
        "word_embeddings.weight",
        "lm_head.weight",
    )
    tensors = {} if isinstance(weights, Problem) else weights
    return max(
        (tensor.shape[0] for name, tensor in tensors.items() if name.endswith(names) and len(tensor.shape) == 2),
        default=0,
    )


def adapter_token_rows(folder: str | Path) -> int:
    """The number of embedding rows needed for tokens that an adapter has trained alone: their highest id + 1."""
    indices = adapter_config(folder).get("trainable_token_indices") or ()
    lists = indices.values() if isinstance(indices, dict) else [indices]
    rows = (row for part in lists if isinstance(part, list) for row in part)
    return max((row + 1 for row in rows if type(row) is int), default=0)


def adapter_parameters(folder: str | Path) -> int:
    """The number of weights of an adapter; 0 if its header cannot be read."""
    weights = read_header(Path(folder) / ADAPTER_FILES[1])
    return 0 if isinstance(weights, Problem) else sum(math.prod(tensor.shape) for tensor in weights.values())
