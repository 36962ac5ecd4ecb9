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
from engine.spec.strategies import EXTRA_NOT_DIVIDED, FSDP2_LIMITS, ZERO_LIMITS, limit_problems, reason_of

FOLDER = Path(__file__).parent
COMPARED, METHODS = ("Qwen2.5-7B", "Llama-3.1-70B"), ("full", "LoRA", "QLoRA, 4 bits")
DIVIDED_BY = (
    ("ddp", 8), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8), ({"kind": "fsdp2", "cpu_offload": True}, 8), ("zero2", 8),
    ("zero3", 8),
)  # fmt: skip
PAGES = {"strategies.md": ("en", ", "), "strategies_zh.md": ("zh", "、")}  # its language, and what separates words


def pages() -> dict[str, str]:
    """The name of each page → its text."""
    extra = [f"`{name}`" for name in EXTRA_NOT_DIVIDED]
    memory = "".join(_memory_rows())
    texts = {}
    for name, (language, comma) in PAGES.items():
        text = (FOLDER / f"{name}.template").read_text(encoding="utf-8")
        rows, zero = ("".join(_row(limit, language) for limit in limits) for limits in (FSDP2_LIMITS, ZERO_LIMITS))
        texts[name] = text.format(rows=rows, zero=zero, memory=memory, extra=comma.join(extra))
    return texts


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
                    changed = spec.change("hardware", divided)
                    need = memory_needed(changed, facts, processes)
                    assert need
                    possible = not limit_problems(changed, changed.hardware.strategy.kind)
                    cells.append(f"{need.total / memory_table.GB:,.0f}" if possible else "—")
                yield f"| {name}, {method} | {' | '.join(cells)} |\n"


def _row(limit: Limit, language: str) -> str:
    allowed = ", ".join(map(_value, limit.allowed))
    stages = ", ".join(f"`{stage}`" for stage in limit.stages)
    reason = reason_of(limit)[language] if limit.reason else ""
    return f"| `{limit.path}` | {allowed} | {stages or reason} |\n"


def _value(value: Any) -> str:
    return "—" if value in (None, "", []) else f"`{value}`"
