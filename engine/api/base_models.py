"""The models that jobs start from: the operator's table of names, or every model of the model folders.

The table is a YAML file, name → folder, or name → settings of the runs that start from it:

    gpt-4o-mini-2024-07-18: Qwen2.5-7B-Instruct
    gpt-4.1-nano-2025-04-14:
      model: /srv/models/SmolLM2-135M-Instruct
      preset: qlora_7b
      settings: {training: {learning_rate: 1.0e-4}, hardware: {devices: [0]}}
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Refusal, problem
from engine.launch.workspace import Workplace, absolute_path
from engine.models.discovery import find_models, identity
from engine.spec.run_spec import RunSpec
from engine.spec.yaml_text import read_yaml

NAME_PATTERN = re.compile(r"[\w][\w./@-]{0,99}")  # no colon, which separates the parts of the names of results
SEARCHED_EVERY_SECONDS = 10.0  # hundreds of models are not searched for with every request
# OpenAI reports every step and keeps a checkpoint of each of the last three epochs.
AS_OPENAI = {"logging": {"logging_steps": 1, "save_strategy": "epoch", "save_total_limit": 3}}


@dataclass(frozen=True)
class BaseModel:
    """`folder`: a path, as in `model.model_name_or_path`; `settings`: parts of the specs of its runs."""

    name: str
    folder: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, workplace: Workplace, stage: str) -> RunSpec:
        """The spec of a run of this stage with everything else as its preset, its settings and the defaults say. Raises
        Refusal if they do not fit together."""
        whole = _merged(AS_OPENAI, self.settings)
        # Settings of another stage than the job's do not apply.
        kept = whole.get("stage", {}) if whole.get("stage", {}).get("kind") == stage else {}
        model = whole.get("model", {}) | {"model_name_or_path": self.folder}
        data = whole.get("data", {}) | {"datasets": {}, "eval_datasets": [], "dataset_dir": str(workplace.data)}
        return RunSpec.read(whole | {"stage": {"kind": stage} | kept, "model": model, "data": data, "name": ""})


def add_api_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag for the table, with its environment variable."""
    parser.add_argument(
        "--api-models",
        metavar="FILE",
        type=Path,
        default=os.environ.get("ATHANOR_API_MODELS") or None,
        help=(
            "YAML file with the models that programs may fine-tune through /v1, name: folder; by default all in the "
            "model folders [ATHANOR_API_MODELS]"
        ),
    )


class BaseModels(dict[str, BaseModel]):
    """Base models by name."""

    @cached_property
    def by_identity(self) -> dict[str, str]:
        """Their names by what their folders are; of several, the first. Looked up once, not for every job of a list."""
        return {identity(model.folder): model.name for model in reversed(self.values())}

    def name_of(self, folder: str) -> str:
        """The name under which the table has a model folder; the folder's own name if it does not."""
        return self.by_identity.get(identity(folder)) or Path(folder).name


def base_models(workplace: Workplace, table: Path | None) -> BaseModels:
    """The base models by name. Raises Refusal if the table cannot be read."""
    if table is None:
        return _in_folders(workplace.models, int(time.monotonic() // SEARCHED_EVERY_SECONDS))
    try:
        text = regular_files.read_text(table)
    except OSError as error:
        raise Refusal(problem("file-unreadable", file=table, why=error.strerror or error)) from error
    except UnicodeDecodeError as error:
        raise Refusal(problem("file-not-text", file=table)) from error
    entries = _at(str(table), lambda: read_yaml(text))
    if not isinstance(entries, dict):
        raise Refusal(problem("api-table", file=table))
    names = {str(name): entry for name, entry in entries.items()}
    return BaseModels({name: _base_model(workplace, table, name, entry) for name, entry in names.items()})


@lru_cache(maxsize=4)
def _in_folders(roots: tuple[Path, ...], _period: int) -> BaseModels:
    models = [model for model in find_models(roots) if not model.adapter_of]
    return BaseModels({model.name: BaseModel(model.name, str(model.path)) for model in models})


def _base_model(workplace: Workplace, table: Path, name: str, entry: Any) -> BaseModel:
    entry = {"model": entry} if isinstance(entry, str) else entry
    if not NAME_PATTERN.fullmatch(name) or not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise Refusal(problem("api-table-entry", file=table, name=name[:100]))
    if unknown := set(entry) - {"model", "preset", "settings"}:
        raise Refusal(problem("api-table-key", file=table, name=name, key=min(map(str, unknown))))
    preset, presets = entry.get("preset"), workplace.presets()
    if preset is not None and preset not in presets:
        raise Refusal(problem("spec-choice", f"{name}.preset", given=preset, choices=", ".join(presets)))
    folder = absolute_path(entry["model"], workplace.model_roots, "config.json")
    if not os.path.isdir(folder):
        raise Refusal(problem("api-table-model", file=table, name=name, folder=entry["model"]))
    model = BaseModel(name, folder, _merged(presets[preset]["spec"] if preset else {}, entry.get("settings") or {}))
    stage = model.settings.get("stage", {}).get("kind", "sft")
    _at(f"{table}, {name}", lambda: model.spec(workplace, stage))  # refuses settings that do not exist
    return model


def _at(place: str, act: Callable[[], Any]) -> Any:
    """What `act` returns; its problems get this place."""
    try:
        return act()
    except Refusal as refusal:
        raise Refusal([wrong.at(place) for wrong in refusal.problems]) from None


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, the values of the second before those of the first, and mappings in both merged likewise; a part
    of another kind replaces the first as a whole."""
    merged = dict(first)
    for name, value in second.items():
        before = merged.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and _same_kind(before, value):
            value = _merged(before, value)
        merged[name] = value
    return merged


def _same_kind(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return value.get("kind", before.get("kind")) == before.get("kind")
