"""What the panels of the Export tab have in common. An export is a run like any other, so handlers keep nothing: the form
becomes an ExportSpec, and the list below it is read from the folders of the exports.
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
    root: str  # before the path of each address
    message: gr.HTML  # shows that something was done, or why it was not
    user: Callable[[gr.Request], str]  # who asks


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace, self.message = context.words, context.workplace, context.message
        self.saves, self.user = context.workplace.saves, context.user
