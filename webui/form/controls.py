"""The controls of the form, each created from the type of its setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypedDict

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from engine.spec.run_spec import SPEC_CHOICES, RunSpec, union_of
from webui import boxes
from webui.form.settings import WEIGHTS, choices, control_kind, element_id, kinds_of
from webui.form.writing import control_values
from webui.panels import Updates
from webui.words import Words


class Form:
    """The controls of one page, with the values of `spec`. `place` puts one where it is called; every setting must be
    placed once."""

    def __init__(self, words: Words, spec: RunSpec):
        self.words = words
        self.built = control_values(spec)
        self.controls: dict[str, Component] = {}  # by the path of the setting

    def place(self, path: str) -> Component:
        control = CONTROLS[control_kind(path)](path, self.words, self.built[path])
        self.controls[path] = control
        if path in SPEC_CHOICES:
            self._kinds(path)
        return control

    def _kinds(self, path: str) -> None:
        """One sentence for each kind; the style sheet shows that of the chosen one."""
        union = element_id(path)
        sentences = (
            f'<p class="of-{union} of-{union}-{kind}">{escape(self.words.kind(path, kind))}</p>'
            for kind in SPEC_CHOICES[path]
        )
        gr.HTML("".join(sentences), elem_classes=["kinds"])

    @property
    def inputs(self) -> list[Block]:
        return list(self.controls.values())

    def values(self, held: Sequence[Any]) -> dict[str, Any]:
        """The values of the controls, by path, from the arguments of a handler."""
        return dict(zip(self.controls, held, strict=True))

    def updates(self, spec: RunSpec) -> Updates:
        """New values for every control."""
        now = control_values(spec)
        return {control: now[path] for path, control in self.controls.items()}

    def first(self, now: Mapping[str, Any]) -> Updates:
        """These values for a page that has just been opened: each costs the browser a few milliseconds, so only values
        that differ from the initial ones are sent."""
        return {control: now[path] for path, control in self.controls.items() if now[path] != self.built[path]}


def kinds_css() -> str:
    """Rules that show a setting only while its kind is chosen: immediately, without asking the server."""
    rules = []
    for path, kinds in SPEC_CHOICES.items():
        union = element_id(path)
        for kind in kinds:
            chosen = f'.gradio-container:has(#{union} input[value="{kind}"]:checked)'
            rules.append(f"{chosen} .of-{union}:not(.of-{union}-{kind}){{display:none!important}}")
    return "\n".join(rules)


class _Attributes(TypedDict):
    """The arguments of every control."""

    label: str
    info: str | None
    elem_id: str
    elem_classes: list[str]
    interactive: bool
    value: Any


def _attributes(path: str, words: Words, value: Any) -> _Attributes:
    classes = ["field", f"field-{control_kind(path)}"]
    if (choice := union_of(path)) and (kinds := kinds_of(path)):
        union = element_id(choice)
        classes += [f"of-{union}", *(f"of-{union}-{kind}" for kind in kinds)]
    return {
        "label": words("weights-of", what=words.label(WEIGHTS[path])) if path in WEIGHTS else words.label(path),
        "info": words("weights-help") if path in WEIGHTS else words.help(path),
        "elem_id": element_id(path),
        "elem_classes": classes,
        "interactive": True,
        "value": value,
    }


def _text(path: str, words: Words, value: Any) -> gr.Textbox:
    return gr.Textbox(**_attributes(path, words, value), lines=1, max_lines=1, min_width=120)


def _number(path: str, words: Words, value: Any) -> gr.Textbox:
    return boxes.number(**_attributes(path, words, value))


def _checkbox(path: str, words: Words, value: Any) -> gr.Checkbox:
    return gr.Checkbox(**_attributes(path, words, value), min_width=120)


def _labelled(path: str, words: Words) -> list[tuple[str, str]]:
    return [(words.choice(path, value), value) for value in choices(path)]


def _choice(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown(_labelled(path, words), **_attributes(path, words, value), min_width=120)


def _choices(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown(_labelled(path, words), multiselect=True, **_attributes(path, words, value), min_width=120)


def _names(path: str, words: Words, value: Any) -> gr.Dropdown:
    # Any name is accepted here: a clone may contain a name that no longer exists, which the engine reports. The choices
    # are what is on disk, and the page fills them in.
    return gr.Dropdown([], multiselect=True, allow_custom_value=True, **_attributes(path, words, value), min_width=120)


def _model(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown([], allow_custom_value=True, **_attributes(path, words, value), min_width=120)


def _union(path: str, words: Words, value: Any) -> gr.Radio:
    # No general help: the sentence of the chosen kind is below.
    return gr.Radio(_labelled(path, words), **_attributes(path, words, value) | {"info": None}, min_width=120)


def _yaml(path: str, words: Words, value: Any) -> gr.Textbox:
    about = _attributes(path, words, value)
    return gr.Textbox(**about | {"elem_classes": [*about["elem_classes"], "mono"]}, lines=3, max_lines=12)


CONTROLS: dict[str, Callable[[str, Words, Any], Any]] = {
    "text": _text,
    "number": _number,
    "tick": _checkbox,
    "choice": _choice,
    "choices": _choices,
    "list": _text,
    "names": _names,
    "modules": _names,
    "weights": _text,
    "model": _model,
    "result": _model,
    "union": _union,
    "yaml": _yaml,
}
