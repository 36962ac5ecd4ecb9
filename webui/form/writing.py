"""From a RunSpec to the values of the controls."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engine.spec.run_spec import SPEC_CHOICES, RunSpec, union_of
from engine.spec.yaml_text import write_yaml
from webui.form.settings import WEIGHTS, control_kind, kinds_of, paths


def number_text(value: float | None) -> str:
    """A number in its usual form: 3.0 → "3", 1e-05 → "1e-5"; none → ""."""
    if value is None:
        return ""
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].replace("+", ""), repr(value)).removesuffix(".0")


FORMATTERS: dict[str, Callable[[Any], Any]] = {
    "text": lambda value: value or "",
    "number": number_text,
    "tick": bool,
    "choice": str,
    "choices": list,
    "list": lambda value: ", ".join(map(str, value)),
    "names": list,
    "modules": list,
    "model": str,
    "union": str,
    "result": lambda value: value or "",
    "yaml": lambda value: write_yaml(value) if value else "",
    "weights": lambda value: ", ".join(f"{name}: {number_text(w)}" for name, w in value.items() if w != 1),
}


def control_values(spec: RunSpec) -> dict[str, Any]:
    """The values of all controls for `spec`, by path."""
    return defaults() | chosen_values(spec)


def chosen_values(spec: RunSpec) -> dict[str, Any]:
    """The values of the controls for `spec`, without settings of kinds that are not chosen."""
    plain = spec.model_dump(mode="json")
    shown = {}
    for path in paths():
        value: Any = plain
        for step in path.split(":")[0].split("."):
            value = value.get(step, ...) if isinstance(value, dict) else ...
            if value is ...:
                break
        if value is not ...:
            shown[path] = FORMATTERS[control_kind(path)](value["kind"] if path in SPEC_CHOICES else value)
    return shown


def defaults() -> dict[str, Any]:
    """The values of the controls of kinds that are not chosen: the declared defaults."""
    shown = {}
    for path in paths():
        if path not in SPEC_CHOICES and (union := union_of(path)):
            part, name = SPEC_CHOICES[union][kinds_of(path)[0]], WEIGHTS.get(path, path).rsplit(".", 1)[-1]
            shown[path] = FORMATTERS[control_kind(path)](part().model_dump(mode="json")[name])
    return shown
