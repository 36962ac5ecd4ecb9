"""A form as it was left: the values of its controls as text, and back. What comes back may be from another version, or
from somebody else's program, so each value must be one that its control can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from webui.form.settings import choices, control_kind, paths

FROM_LIST = ("choice", "union", "choices")  # kinds of controls that hold nothing but what they list


class KeptForm(NamedTuple):
    """The preset that was chosen, and the values of the controls by path, as far as they are possible."""

    preset: str | None
    values: dict[str, Any]


def as_text(preset: Any, values: Mapping[str, Any]) -> str:
    """The form as text; page.js writes the same (`athanorKeep`)."""
    return json.dumps({"preset": preset, "values": dict(values)}, ensure_ascii=False)


def read(text: Any, built: Mapping[str, Any]) -> KeptForm | None:
    """The form from text; None if it is not one. `built` has a value of each control."""
    try:
        plain = json.loads(text) if isinstance(text, str) and text else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(plain, dict) or not isinstance(values := plain.get("values"), dict):
        return None
    return KeptForm(
        preset if isinstance(preset := plain.get("preset"), str) else None,
        {path: values[path] for path in paths() if path in values and _fits(path, values[path], built[path])},
    )


def _fits(path: str, value: Any, built: Any) -> bool:
    if isinstance(built, list):
        several = value if isinstance(value, list) else [None]
        right = all(isinstance(name, str) for name in several)
    else:
        several, right = [value], type(value) is type(built)
    return right and (control_kind(path) not in FROM_LIST or all(name in choices(path) for name in several))
