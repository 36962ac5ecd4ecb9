"""What the panels of the Data tab have in common.

The page keeps which set is open; handlers keep nothing, and each call reads the files.
"""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from webui import panels
from webui.data_tab.data_folder import DataFolder, Selection
from webui.panels import Updates


@dataclass(frozen=True)
class Context(panels.Context):
    """What every panel is given."""

    chosen: gr.Textbox  # id of the open set or file; "" = none


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace = context.words, context.workplace
        self.message, self.chosen = context.message, context.chosen
        self.folder = DataFolder(context.workplace.data)

    @property
    def outputs(self) -> list[Block]:
        """The components that change when a set is opened."""
        return []

    def opened(self, selection: Selection) -> Updates:
        """The panel for this set or file."""
        return {}

    def closed(self) -> Updates:
        """The panel when nothing is open."""
        return {}


def row_number(text: str) -> int:
    """A typed row number, from 1; 1 if it is invalid."""
    digits = str(text or "").replace(",", "").strip()
    return max(int(digits), 1) if digits.isdecimal() and len(digits) < 12 else 1
