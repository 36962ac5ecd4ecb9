"""What the panels of the Export tab have in common.

An export is a run like any other, so handlers keep nothing: the form becomes an ExportSpec, and the list below it is
read from the folders of the exports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from webui import panels


@dataclass(frozen=True)
class Context(panels.Context):
    """What every panel is given."""

    user: Callable[[gr.Request], str]  # the user's name


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace, self.message = context.words, context.workplace, context.message
        self.saves, self.user = context.workplace.saves, context.user
