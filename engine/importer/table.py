"""The counterparts of each key of another program, read from the YAML tables next to this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLES_FOLDER = Path(__file__).parent
EMPTY_VALUES = (None, False, "", "none", "None", "null")  # values without effect, whatever the key


@dataclass(frozen=True)
class Entry:
    """The counterpart of one key. `paths`: the path for each stage (or "evaluation", "export"); under "" for all. The
    other fields are described in llamafactory.yaml."""

    paths: Mapping[str, str] = field(default_factory=dict)
    converter: str = ""
    same: str = ""
    none: str = ""
    part: str = ""
    plain: tuple[Any, ...] = ()
    secret: bool = False
    remark: Mapping[str, str] = field(default_factory=dict)

    def path(self, kind: str) -> str:
        """The path in a spec of this stage or kind; "" if there is none."""
        return self.paths.get(kind) or self.paths.get("", "")

    def asks_nothing(self, value: Any) -> bool:
        """Whether the run is the same without the key. If it is on by default, false has an effect."""
        if value is False and any(plain_value is True for plain_value in self.plain):
            return False
        return value in EMPTY_VALUES or value in self.plain


@dataclass(frozen=True)
class Section:
    """Keys that belong together, in the order of the table."""

    title: Mapping[str, str]
    keys: Mapping[str, Entry]
    note: Mapping[str, str] = field(default_factory=dict)


@cache
def sections(program: str) -> tuple[Section, ...]:
    """The table of a program: "llamafactory", "launchers" or "axolotl"."""
    return tuple(
        Section(
            section["title"],
            {name: _entry(name, about) for name, about in section["keys"].items()},
            section.get("note", {}),
        )
        for section in _load_table(program)["sections"]
    )


@cache
def entries(program: str) -> Mapping[str, Entry]:
    """Key → its counterpart."""
    return {name: entry for section in sections(program) for name, entry in section.keys.items()}


@cache
def reasons() -> Mapping[str, Mapping[str, str]]:
    """Name of a reason → language → the reason, from all tables."""
    reasons_by_name: dict[str, Mapping[str, str]] = {}
    for program in ("llamafactory", "launchers", "axolotl"):
        reasons_by_name |= _load_table(program).get("reasons", {})
    return reasons_by_name


@cache
def _load_table(program: str) -> Mapping[str, Any]:
    return yaml.load((TABLES_FOLDER / f"{program}.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _entry(name: str, about: str | Mapping[str, Any]) -> Entry:
    if isinstance(about, str):
        return Entry({"": about})
    to = f"extra.{name}" if about.get("extra") else about.get("to", {})
    return Entry(
        {"": to} if isinstance(to, str) else to,
        about.get("converter", ""),
        about.get("same", ""),
        about.get("none", ""),
        about.get("part", ""),
        tuple(about.get("plain", ())),
        about.get("secret", False),
        {language: about[language] for language in ("en", "zh") if language in about},
    )
