"""What the panels of the Data tab have in common.

A panel has three parts: `layout` builds its components where it is called, handlers answer with the new values of
components, by component, and `wire` binds the handlers to events. Which set is open stands in the page: handlers keep
nothing, and each look reads the files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from webui import notices
from webui.data_tab.data_folder import DataFolder, Selection
from webui.words import Words

Updates = dict[Block, Any]  # new values, or `gr.update(…)`; components that are not in it stay as they are


@dataclass(frozen=True)
class Context:
    """What every panel is given."""

    words: Words
    workplace: Workplace
    root: str  # before the path of each address
    message: gr.HTML  # shows that something was done, or why it was not
    chosen: gr.Textbox  # id of the open set or file; "" = none


class Panel:
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace = context.words, context.workplace
        self.message, self.chosen = context.message, context.chosen
        self.folder = DataFolder(context.workplace.data)

    @property
    def outputs(self) -> list[Block]:
        """What changes when a set is opened."""
        return []

    def opened(self, selection: Selection) -> Updates:
        """The panel for this set or file."""
        return {}

    def closed(self) -> Updates:
        """The panel when nothing is open."""
        return {}


def refusal_as_message(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """A method of a panel whose Refusal is shown as a message, with nothing else changed."""

    @functools.wraps(handler)
    def answer(self: Panel, *values: Any) -> Updates:
        try:
            return handler(self, *values)
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}

    return answer


def hidden_value() -> gr.Textbox:
    """Something that the page remembers for a handler. To be built outside of tabs that may never be looked at."""
    return gr.Textbox(elem_classes="unseen", container=False)


def row_number(text: str) -> int:
    """A row's number, from 1, as somebody typed it; 1 if it is none."""
    digits = str(text or "").replace(",", "").strip()
    return max(int(digits), 1) if digits.isdecimal() and len(digits) < 12 else 1
