"""Generate documentation pages from the program: docs/spec.md from the declarations in engine/spec/run_spec.py, and
the pages of `docs.llamafactory`, `docs.strategies` and `docs.memory_table`. Run `python -m docs.make`; tests compare
the pages with the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docs import llamafactory, memory_table, strategies
from engine.spec.run_spec import SPEC_CHOICES, fields

PAGE = Path(__file__).parent / "spec.md"
HEAD = """# Settings of a run

Generated from `engine/spec/run_spec.py` by `make docs`; do not edit. The form, the YAML and the command line use the
same declarations. A setting that belongs to one kind (such as `method.r` to LoRA) is absent if another kind is chosen.
`data.datasets` and `stage.rewards` are lists of names, or mappings of names to weights: `[a, b]` is short for
`{a: 1, b: 1}`.
"""


def page() -> str:
    """The whole page as Markdown."""
    lines, part = [HEAD], ""
    for path, info in fields().items():
        if path.split(".")[0] != part:
            part = path.split(".")[0]
            lines += [f"\n## {part}\n", "| setting | default | limits | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{path}` | {_default(info)} | {_limits(path, info)} | **{info.title}.** {info.description} |")
    return "\n".join(lines).replace("\\\n", "\n") + "\n"


def _default(info: Any) -> str:
    value = info.get_default(call_default_factory=True)
    if hasattr(value, "kind"):
        return f"`{value.kind}`"
    return "—" if value in (None, "", [], {}) else f"`{value}`"


def _choices(kind: Any) -> list[str]:
    """The values that a setting, or each item of its list, can take, if it is one of several words."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return next(filter(None, map(_choices, get_args(kind))), [])


def _limits(path: str, info: Any) -> str:
    if path in SPEC_CHOICES:
        return " ".join(f"`{kind}`" for kind in SPEC_CHOICES[path])
    if choices := _choices(info.annotation):
        return " ".join(f"`{choice}`" for choice in choices)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in info.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join(limits) or "—"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for file, text in (llamafactory.pages() | strategies.pages()).items():
        (PAGE.parent / file).write_text(text, encoding="utf-8")
    memory_table.PAGE.write_text(memory_table.page(memory_table.needs()), encoding="utf-8")
