"""Generate docs/strategies.md and docs/strategies_zh.md: what may be combined with which strategy, from the table in
engine/spec/strategies.py and the templates next to this module. `python -m docs.make` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.spec.strategies import EXTRA_NOT_WITH_FSDP2, FSDP2_LIMITS, Limit

FOLDER = Path(__file__).parent
PAGES = {"strategies.md": ", ", "strategies_zh.md": "、"}  # and what separates the words of a list


def pages() -> dict[str, str]:
    """The name of each page → its text."""
    rows = "".join(map(_row, FSDP2_LIMITS))
    extra = [f"`{name}`" for name in EXTRA_NOT_WITH_FSDP2]
    templates = {name: (FOLDER / f"{name}.template").read_text(encoding="utf-8") for name in PAGES}
    return {name: text.format(rows=rows, extra=PAGES[name].join(extra)) for name, text in templates.items()}


def _row(limit: Limit) -> str:
    allowed = ", ".join(map(_value, limit.allowed))
    stages = ", ".join(f"`{stage}`" for stage in limit.stages)
    return f"| `{limit.path}` | {allowed} | {stages} |\n"


def _value(value: Any) -> str:
    return "—" if value in (None, "", []) else f"`{value}`"
