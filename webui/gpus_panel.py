"""The GPUs, refreshed every few seconds while they are visible. Without a driver there is nothing to refresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr
from gradio.blocks import Block

from engine.core import hardware
from engine.runs.gpu_use import GpuUse, gpu_uses
from webui.events import QUIET
from webui.panels import Panel, Updates
from webui.shared_answers import SharedAnswers
from webui.words import Words

POLL_SECONDS = 5
_shared = SharedAnswers(POLL_SECONDS / 2)  # all pages show the same


class GpusPanel(Panel):
    """`html` writes them, as `gpus_html.bars` or `table`. `visible`: whether its tab is the first that is shown."""

    def __init__(self, words: Words, html: Callable[[Sequence[GpuUse], Words], str], name: str, visible: bool = False):
        self.words, self.html, self.name, self.visible = words, html, name, visible

    def layout(self) -> None:
        self.shown = gr.HTML(elem_id=self.name)
        self.timer = gr.Timer(POLL_SECONDS, active=self.visible and hardware.may_have_gpus())

    def wire(self) -> None:
        self.timer.tick(self.now, None, self.shown, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        """The outputs of `open`."""
        return [self.shown, self.timer]

    def open(self) -> Updates:
        """Show the GPUs from now on."""
        return self.now() | {self.timer: gr.Timer(active=hardware.may_have_gpus())}

    def now(self) -> Updates:
        return _shared.get((self.shown, self.words.language), lambda: {self.shown: self.html(gpu_uses(), self.words)})
