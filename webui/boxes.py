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
    """What was typed, without the spaces around it; full-width digits of a Chinese keyboard become plain ones."""
    return unicodedata.normalize("NFKC", "" if raw is None else str(raw)).strip()


def typed_values(values: Mapping[str, Any]) -> dict[str, str]:
    """What was typed into each box that was not left empty: an empty one is as the spec has it."""
    return {name: text for name, raw in values.items() if (text := typed(raw))}


def with_labels(problems: Iterable[Problem], names: Mapping[str, str], words: Words) -> list[Problem]:
    """The problems with each field called as the page calls it; `names` has the word by the field's path. What is said
    of two fields that one box fills is said once."""
    labelled: list[Problem] = []
    for problem in problems:
        problem = replace(problem, field=words(names[problem.field])) if problem.field in names else problem
        labelled += [problem] if problem not in labelled else []
    return labelled
