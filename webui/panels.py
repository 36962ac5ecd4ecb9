"""What the panels of all tabs have in common.

A panel is one part of a tab, and has three parts itself: `layout` builds its components where it is called, handlers
return the new values of components, by component, and `wire` binds the handlers to events. Handlers keep nothing
between calls: the page keeps what is chosen, and everything else is in the folders that they read.
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
from webui.words import Words

Updates = dict[Block, Any]  # new values, or `gr.update(…)`; other components stay unchanged


@dataclass(frozen=True)
class Context:
    """What the panels of a tab are given; a tab adds its own."""

    words: Words
    workplace: Workplace
    root: str  # prefix of each address
    message: gr.HTML  # shows that something was done, or why it was not


class Panel:
    """The base of every panel."""

    words: Words
    message: gr.HTML  # shows that something was done, or why it was not


def refusal_as_message(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """A method of a panel whose Refusal is shown as a message, with nothing else changed."""

    @functools.wraps(handler)
    def answer(self: Panel, *values: Any) -> Updates:
        try:
            return handler(self, *values)
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}

    return answer


BY_READER = "by-reader"  # the class of a hidden value that a click changes, and not only handlers


def hidden_value(value: str | None = None, elem_id: str | None = None, by_reader: bool = False) -> gr.Textbox:
    """A value that the page remembers for a handler; `by_reader`: a click in the browser changes it, too. To be built
    outside tabs that may never be shown."""
    return gr.Textbox(value, elem_classes=["unseen", *[BY_READER] * by_reader], container=False, elem_id=elem_id)


def is_of_reader(block: Block) -> bool:
    """Whether the reader can change its value; a hidden value that only handlers change describes what is shown."""
    classes = getattr(block, "elem_classes", None) or ()
    return "unseen" not in classes or BY_READER in classes
