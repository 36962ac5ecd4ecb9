"""What the panels of the Train tab have in common.

The form is a RunSpec: handlers keep nothing, and read it from the controls each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from engine.launch.workspace import Workplace
from webui import panels
from webui.words import Words


@dataclass(frozen=True)
class Context:
    """What every panel is given."""

    words: Words
    workplace: Workplace
    message: gr.HTML  # shows that something was done, or why it was not
    user: Callable[[gr.Request], str]  # the user's name
    selected: gr.Textbox  # id of the run shown on the Runs tab


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace, self.message = context.words, context.workplace, context.message
