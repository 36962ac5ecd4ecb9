"""From the values of the controls to a RunSpec, and all problems with it, each at its field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, union_of
from engine.spec.yaml_text import read_yaml
from webui import boxes
from webui.form.settings import WEIGHTS, control_kind, kinds_of, optional, setting_of


def _read_text(path: str, raw: Any) -> Any:
    text = "" if raw is None else str(raw).strip()
    return None if optional(path) and not text else text


def _read_number(path: str, raw: Any) -> Any:
    text = boxes.typed(raw)
    return None if optional(path) and not text else text


def _read_list(path: str, raw: Any) -> list[str]:
    return [part for part in re.split(r"[,，、;；\s]+", boxes.typed(raw)) if part]


def _read_several(path: str, raw: Any) -> list[Any]:
    return list(raw or []) if isinstance(raw, (list, tuple, type(None))) else [raw]


def _read_modules(path: str, raw: Any) -> list[str]:
    # One of them may be a whole list that was pasted.
    return [name for part in _read_several(path, raw) for name in _read_list(path, part)]


def _read_yaml(path: str, raw: Any) -> Any:
    """Raises Refusal at the field if the text is not YAML."""
    value = read_yaml("" if raw is None else str(raw), path.split(":")[0])
    return {} if value is None else value


def _read_weights(path: str, raw: Any) -> Any:
    text = boxes.typed(raw)
    return _read_yaml(path, text if "\n" in text or text.startswith("{") else f"{{{text}}}")


PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "text": _read_text,
    "number": _read_number,
    "tick": lambda path, raw: raw,
    "choice": lambda path, raw: raw,
    "choices": _read_several,
    "list": _read_list,
    "names": _read_several,
    "modules": _read_modules,
    "weights": _read_weights,
    "model": _read_text,
    "result": _read_text,
    "union": lambda path, raw: raw,
    "yaml": _read_yaml,
}


def read(values: Mapping[str, Any]) -> tuple[RunSpec, list[Problem]]:
    """The spec from the values of the controls, and all problems with them, each at its field.

    If a value cannot be parsed, the spec has the default instead, so that the rest can still be checked.
    """
    plain, problems = _plain(values)
    while True:
        try:
            return RunSpec.read(plain), problems
        except Refusal as refusal:
            problems += refusal.problems
            if not all(_drop(plain, setting_of(problem.field)) for problem in refusal.problems):
                return RunSpec(), problems


def _plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Nested plain data of the settings that apply, and what could not even be split into values."""

    def applies(path: str) -> bool:
        union = union_of(path)
        return not union or values.get(union) in kinds_of(path)

    plain: dict[str, Any] = {}
    problems: list[Problem] = []
    read_values: dict[str, Any] = {}
    for path, raw in values.items():
        try:
            read_values[path] = PARSERS[control_kind(path)](path, raw)
        except Refusal as refusal:
            problems += refusal.problems
    read_values = {path: value for path, value in read_values.items() if applies(path)}
    for typed, path in WEIGHTS.items():
        weights = read_values.pop(typed, {})
        if not isinstance(weights, dict):
            problems.append(problem("spec-type-dict", path, given=str(weights)[:60]))
            weights = {}
        if path in read_values:
            chosen = [str(name) for name in read_values[path]]
            problems += [
                problem("weight-without-set", path, name=str(name)[:60], chosen=", ".join(chosen) or "—")
                for name in weights
                if str(name) not in chosen
            ]
            read_values[path] = {name: weights.get(name, 1.0) for name in chosen}
    for path, value in read_values.items():
        *parents, last = path.split(".")
        inner = plain
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if path in SPEC_CHOICES:
            inner.setdefault(last, {})["kind"] = value
        else:
            inner[last] = value
    return plain, problems


def _drop(plain: dict[str, Any], path: str) -> bool:
    """Remove the value at `path`. Returns whether there was one."""
    *parents, last = path.split(".")
    inner = plain
    for parent in parents:
        inner = inner.get(parent, {})
    return inner.pop(last, ...) is not ...
