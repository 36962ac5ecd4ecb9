"""The command that serves the selected models to other programs."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from webui import notices
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.panel import Panel
from webui.panels import Updates


class ApiPanel(Panel):
    def layout(self) -> None:
        with gr.Accordion(self.words("chat-program"), open=False, elem_classes="fold"):
            self.command = gr.HTML()

    @property
    def outputs(self) -> list[Block]:
        return [self.command]

    def for_models(self, selection: ModelSelection) -> Updates:
        return {self.command: notices.code("serve-text", self.models.command(selection), self.words)}
