"""Write the pages that are made from the program: docs/spec.md from the declarations in
engine/spec/run_spec.py, and those of `docs.llamafactory`. `python -m docs.make`; tests compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docs import llamafactory
from engine.spec.run_spec import SPEC_CHOICES, fields

PAGE = Path(__file__).parent / "spec.md"
HEAD = """# Settings of a run

Made from `engine/spec/run_spec.py` by `make docs`; do not edit. The same declarations are the form, the YAML and
the shell's checks. A setting of a kind (`method.r` of LoRA) is absent where another kind is chosen. `data.datasets`
and `stage.rewards` are a list of names or a mapping of names to weights: `[a, b]` is short for `{a: 1, b: 1}`.
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
    """What may stand there, or in a list there, where that is one of several words."""
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
    for file, text in llamafactory.pages().items():
        (PAGE.parent / file).write_text(text, encoding="utf-8")
