"""What the panels of the Evaluate tab have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from webui import boxes, panels
from webui.evaluate_tab.evaluation_models import EvaluationModels
from webui.words import Words

Values = Mapping[Block, Any]  # of controls, by component


@dataclass(frozen=True)
class Context:
    """What every panel is given."""

    words: Words
    workplace: Workplace
    root: str  # path prefix of the studio
    message: gr.HTML  # shows what was done, or why it was refused
    user: Callable[[gr.Request], str]  # the name of the user; "" without login
    progress_of: Callable[[Run], tuple[str, str, str]]  # progress, state and failure of a run as HTML
    models: EvaluationModels
    opened: gr.Textbox  # id of the open evaluation; "" = none


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace, self.message = context.words, context.workplace, context.message
        self.saves, self.data = context.workplace.saves, context.workplace.data
        self.models, self.opened = context.models, context.opened

    def number(self, name: str, value: str, info: str | None = None) -> gr.Textbox:
        """A box for a number of the form; `name` is the end of its code in page.yaml."""
        code = f"evaluate-{name}"
        return boxes.number(value, label=self.words(code), elem_id=code, info=info)
