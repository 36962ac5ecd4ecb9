"""Generate docs/strategies.md and docs/strategies_zh.md: what may be combined with which strategy, from the table in
engine/spec/strategies.py and the templates next to this module. `python -m docs.make` writes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs import memory_table
from engine.models.facts import inspect_model
from engine.preflight.memory import memory_needed
from engine.spec.setting_limits import Limit
from engine.spec.strategies import EXTRA_NOT_WITH_FSDP2, FSDP2_LIMITS

FOLDER = Path(__file__).parent
COMPARED, METHODS = ("Qwen2.5-7B", "Llama-3.1-70B"), ("full", "LoRA", "QLoRA, 4 bits")
DIVIDED_BY = (("ddp", 8), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8), ({"kind": "fsdp2", "cpu_offload": True}, 8))
PAGES = {"strategies.md": ", ", "strategies_zh.md": "、"}  # and what separates the words of a list


def pages() -> dict[str, str]:
    """The name of each page → its text."""
    rows = "".join(map(_row, FSDP2_LIMITS))
    extra = [f"`{name}`" for name in EXTRA_NOT_WITH_FSDP2]
    memory = "".join(_memory_rows())
    templates = {name: (FOLDER / f"{name}.template").read_text(encoding="utf-8") for name in PAGES}
    return {
        name: text.format(rows=rows, memory=memory, extra=PAGES[name].join(extra)) for name, text in templates.items()
    }


def _memory_rows() -> Iterator[str]:
    """The estimated GB on each GPU, for each of `COMPARED` and `DIVIDED_BY`, as rows of a table."""
    with tempfile.TemporaryDirectory() as place:
        for name in COMPARED:
            facts = inspect_model(memory_table.write_headers(Path(place) / name, memory_table.SHAPES[name]))
            for method in METHODS:
                spec = memory_table.spec_of(facts.path, method)
                cells = []
                for strategy, processes in DIVIDED_BY:
                    divided = {"device": "cuda", "num_processes": processes, "strategy": strategy}
                    need = memory_needed(spec.change("hardware", divided), facts, processes)
                    assert need
                    cells.append(f"{need.total / memory_table.GB:,.0f}")
                yield f"| {name}, {method} | {' | '.join(cells)} |\n"


def _row(limit: Limit) -> str:
    allowed = ", ".join(map(_value, limit.allowed))
    stages = ", ".join(f"`{stage}`" for stage in limit.stages)
    return f"| `{limit.path}` | {allowed} | {stages} |\n"


def _value(value: Any) -> str:
    return "—" if value in (None, "", []) else f"`{value}`"
