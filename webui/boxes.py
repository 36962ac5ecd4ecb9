"""Number boxes, the same in every tab: the input stays text, which the engine parses and reports problems with.

Gradio's own number box turns what it cannot parse into nothing, nothing into 0, and out-of-range values into its own
kind of error.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from engine.core.problems import Problem
from webui.words import Words


def number(
    value: str = "",
    *,
    label: str,
    elem_id: str,
    elem_classes: str | list[str] = "field",
    info: str | None = None,
    placeholder: str | None = None,
    interactive: bool = True,
) -> gr.Textbox:
    """A box for one number."""
    attributes = gr.InputHTMLAttributes(autocomplete="off", spellcheck=False)
    return gr.Textbox(
        value,
        label=label,
        elem_id=elem_id,
        elem_classes=elem_classes,
        info=info,
        placeholder=placeholder,
        interactive=interactive,
        lines=1,
        max_lines=1,
        min_width=120,
        html_attributes=attributes,
    )


def typed(raw: Any) -> str:
    """The input without surrounding spaces; full-width digits of a Chinese keyboard become plain ones."""
    return unicodedata.normalize("NFKC", "" if raw is None else str(raw)).strip()


def typed_values(values: Mapping[str, Any]) -> dict[str, str]:
    """The input of each non-empty box; for an empty one the spec's default applies."""
    return {name: text for name, raw in values.items() if (text := typed(raw))}


def with_labels(problems: Iterable[Problem], names: Mapping[str, str], words: Words) -> list[Problem]:
    """The problems with each field shown under its label on the page; `names` has the label by the field's path.
    Problems of two fields with one box are shown once."""
    labelled: list[Problem] = []
    for problem in problems:
        problem = replace(problem, field=words(names[problem.field])) if problem.field in names else problem
        labelled += [problem] if problem not in labelled else []
    return labelled
