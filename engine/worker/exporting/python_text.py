"""Values and calls as Python text."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch

LINE_LENGTH = 120
INDENT = " " * 4


class Code(str):
    """An expression, to be written as it is."""


def literal(value: Any) -> str:
    """The value as it is written in Python."""
    if isinstance(value, Code | torch.dtype):
        return str(value)
    if isinstance(value, enum.Enum):
        return literal(value.value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, str) and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    return repr(value)


def call(function: str, arguments: Mapping[str, Any], *, column: int, positional: str = "") -> str:
    """A call with keyword arguments that begins at this column: on one line if it fits, else one argument a line."""
    parts = ([positional] if positional else []) + [f"{name}={literal(value)}" for name, value in arguments.items()]
    line = f"{function}({', '.join(parts)})"
    if column + len(line) <= LINE_LENGTH:
        return line
    return f"{function}(\n" + "".join(f"{INDENT}{part},\n" for part in parts) + ")"
