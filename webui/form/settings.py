"""Which control a setting needs, and its label on the page."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from engine.spec.run_spec import SPEC_CHOICES, fields, union_of

RUN_NAME = "name"  # shown next to the form, not in it
DATASETS, MODEL = "data.datasets", "model.model_name_or_path"
# Names are chosen, their weights are typed: one setting, two controls.
WEIGHTS = {f"{path}:weights": path for path in (DATASETS, "stage.rewards")}
DATASET_NAMES = (DATASETS, "data.eval_datasets")
ADAPTER = "model.adapter_path"
RESULT_SETTINGS = (ADAPTER, "stage.reward_model")  # results of finished runs
# Names of modules of the chosen model.
TARGET_MODULES, SAVED_MODULES = "method.target_modules", "method.modules_to_save"
ADDED_TOKENS = ("model.add_tokens", "model.add_special_tokens")  # any text, including commas and spaces


def paths() -> list[str]:
    """Every control by the path of its setting, in the order of declaration."""
    control_paths = list(fields())
    for typed, path in WEIGHTS.items():
        control_paths.insert(control_paths.index(path) + 1, typed)
    return control_paths


@cache
def control_kind(path: str) -> str:
    """What kind of control the setting at `path` needs: a key of `controls.CONTROLS`, `reading.PARSERS` and
    `writing.FORMATTERS`."""
    if path in SPEC_CHOICES:
        return "union"
    if path in WEIGHTS:
        return "weights"
    if path == MODEL:
        return "model"
    if path in RESULT_SETTINGS:
        return "result"
    if path in (*DATASET_NAMES, *ADDED_TOKENS):
        return "names"
    if path in (TARGET_MODULES, SAVED_MODULES):
        return "modules"
    kind = _plain_type(fields()[path].annotation)
    if get_origin(kind) is Literal:
        return "choice"
    if get_origin(kind) is list:
        return "choices" if get_origin(get_args(kind)[0]) is Literal else "list"
    if get_origin(kind) is dict or kind is dict:
        return "choices" if path in WEIGHTS.values() else "yaml"
    return {bool: "tick", int: "number", float: "number", str: "text"}[kind]


def _plain_type(annotation: Any) -> Any:
    """The type without `| None` and without Annotated."""
    if hasattr(annotation, "__metadata__"):
        return _plain_type(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain_type(next(member for member in get_args(annotation) if member is not type(None)))
    return annotation


def optional(path: str) -> bool:
    """Whether an empty control means "not set"."""
    return path in fields() and type(None) in get_args(fields()[path].annotation)


def choices(path: str) -> tuple[str, ...]:
    """The possible values of the setting at `path`, if there is a list of them; otherwise ()."""
    if path in SPEC_CHOICES:
        return tuple(SPEC_CHOICES[path])
    kind = _plain_type(fields()[path].annotation)
    kind = get_args(kind)[0] if get_origin(kind) in (list, dict) else kind
    return get_args(kind) if get_origin(kind) is Literal else ()


@cache
def kinds_of(path: str) -> tuple[str, ...]:
    """The kinds of its union that have the setting; () for a setting that always exists."""
    union = union_of(path)
    if not union:
        return ()
    name = WEIGHTS.get(path, path).rsplit(".", 1)[-1]
    return tuple(kind for kind, part in SPEC_CHOICES[union].items() if name in part.model_fields)


def essential(path: str) -> bool:
    return bool((fields()[path].json_schema_extra or {}).get("essential"))


def setting_of(path: str) -> str:
    """The setting that a path belongs to: "data.datasets.identity" → "data.datasets"; "" if there is none."""
    steps = path.split(".")
    prefixes = (".".join(steps[:count]) for count in range(len(steps), 0, -1))
    return next((prefix for prefix in prefixes if prefix in fields()), "")


def part_of(path: str) -> str:
    """The part of the page with a setting."""
    return path.split(".")[0]


def element_id(path: str) -> str:
    return "f-" + path.replace(".", "-").replace(":", "--")


def part_id(path: str) -> str:
    return f"part-{part_of(path)}"
