"""Controls of the form, created from the fields of an ExportSpec."""

from __future__ import annotations

from typing import Any, get_args

import gradio as gr

from engine.export.export_spec import ExportSpec
from webui.words import Words


def choices(name: str, words: Words) -> list[tuple[str, str]]:
    """The values of a setting with their labels."""
    values = get_args(ExportSpec.model_fields[name].annotation)
    return [(words.export_choice(name, value), value) for value in values]


def choice(name: str, words: Words, visible: bool = True) -> gr.Dropdown:
    value = ExportSpec.model_fields[name].default
    return gr.Dropdown(
        choices(name, words),
        value=value,
        elem_classes="field field-choice",
        visible=visible,
        interactive=True,
        **_attributes(name, words),
    )


def text(name: str, words: Words, lines: int = 1, visible: bool = True, help: str = "") -> gr.Textbox:
    default = ExportSpec.model_fields[name].get_default(call_default_factory=True)
    about = _attributes(name, words) | ({"info": help} if help else {})
    shown = "" if default in (None, []) else f"{default:g}" if isinstance(default, (int, float)) else default
    kind = "field field-number" if isinstance(default, (int, float)) or default is None else "field"
    return gr.Textbox(
        shown, lines=lines, max_lines=max(lines, 1) * 4 if lines > 1 else 1, elem_classes=kind, visible=visible, **about
    )


def _attributes(name: str, words: Words) -> dict[str, Any]:
    return {
        "label": words.of_export(name, "label"),
        "info": words.of_export(name, "help"),
        "elem_id": f"export-{name}",
    }
