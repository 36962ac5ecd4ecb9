"""Values and calls as Python text."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
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


def literal_at(value: Any, column: int) -> str:
    """The value from this column on; a dictionary that does not fit on the line has one entry a line."""
    if not isinstance(value, dict):
        return literal(value)
    return _bracketed("{", [f"{literal(key)}: {literal(part)}" for key, part in value.items()], "}", column)


def call(
    function: str, arguments: Mapping[str, Any], *, column: int, first: Sequence[str] = (), last: Sequence[str] = ()
) -> str:
    """A call that begins at this column, with positional arguments `first` and others as they are `last`: on one line
    if it fits, else one argument a line."""
    named = [f"{name}={literal(value)}" for name, value in arguments.items()]
    return _bracketed(f"{function}(", [*first, *named, *last], ")", column)


def _bracketed(opening: str, parts: Sequence[str], closing: str, column: int) -> str:
    line = f"{opening}{', '.join(parts)}{closing}"
    if column + len(line) <= LINE_LENGTH:
        return line
    return f"{opening}\n" + "".join(f"{INDENT}{part},\n" for part in parts) + closing
