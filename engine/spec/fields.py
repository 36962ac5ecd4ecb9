"""The settings of a spec by their paths, and their choices, read from pydantic's declarations."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel


def choices(annotation: Any) -> dict[str, type[BaseModel]]:
    """The parts of a union (`OneOf[Lora | Full]`), by their `kind`; empty for any other type."""
    parts = get_args(annotation)
    if parts and all(isinstance(part, type) and issubclass(part, BaseModel) for part in parts):
        return {part.model_fields["kind"].default: part for part in parts}
    return {}


@cache
def fields_of(whole: type[BaseModel]) -> dict[str, Any]:
    """Every setting of a whole: path → pydantic's FieldInfo, in the order of declaration.

    A choice has its own path ("method"); the settings of each of its kinds follow it ("method.r"). A path that several
    kinds share ("model.rope_scaling.factor") is listed once, since it is one setting.
    """
    fields: dict[str, Any] = {}

    def walk(part: type[BaseModel], prefix: str) -> None:
        for name, info in part.model_fields.items():
            path = prefix + name
            if kinds := choices(info.annotation):
                fields[path] = info
                for kind in kinds.values():
                    walk(kind, f"{path}.")
            elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                walk(info.annotation, f"{path}.")
            elif name != "kind":
                fields.setdefault(path, info)

    walk(whole, "")
    return fields


@cache
def choices_of(whole: type[BaseModel]) -> dict[str, dict[str, type[BaseModel]]]:
    """The settings of a whole that are choices between parts: path → kind → part."""
    return {path: kinds for path, info in fields_of(whole).items() if (kinds := choices(info.annotation))}
