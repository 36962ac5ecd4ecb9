"""What the panels of the Runs tab have in common.

The page keeps which run is open; handlers keep nothing, and each call reads the run's folder, so a reload, another
browser and another user see the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import gradio as gr
from gradio.blocks import Block

from engine.runs.runs import Run
from webui import panels
from webui.panels import Updates


@dataclass(frozen=True)
class Context(panels.Context):
    """What every panel is given."""

    user: Callable[[gr.Request], str]  # the user's name
    selected: gr.Textbox  # id of the open run; "" = the table


class CurveView(NamedTuple):
    """How the curves are drawn: over which axis, how smooth, whether logarithmic, and which part (see
    `charts.part_of`)."""

    x: str
    smoothing: float
    log: bool
    zoom: str = ""


class Panel(panels.Panel):
    """A part of the open run."""

    def __init__(self, context: Context):
        self.context = context
        self.words, self.saves = context.words, context.workplace.saves
        self.message, self.selected = context.message, context.selected

    @property
    def moving(self) -> list[Block]:
        """The components that change while a run is in progress."""
        return []

    @property
    def still(self) -> list[Block]:
        """The other components that change when a run is opened."""
        return []

    def now(self, run: Run, view: CurveView) -> Updates:
        """The changing parts in their current state."""
        return {}

    def gone(self, run_id: str) -> Updates:
        """The parts that can no longer be used when the open run has been deleted elsewhere."""
        return {}

    def opened(self, run: Run) -> Updates:
        """The parts that stay the same as long as the run is open."""
        return {}
