"""The head of the open run: what it is, its progress, and what one has to know first."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from engine.runs.runs import Run
from webui import clicks
from webui.panels import Updates
from webui.runs_tab import head_html
from webui.runs_tab.panel import CurveView, Panel


class HeadPanel(Panel):
    """`layout` is the head itself, `layout_of_findings` is below the buttons."""

    def layout(self) -> None:
        self.head = gr.HTML(js_on_load=clicks.row_click_js("run"), elem_id="run-head")

    def layout_of_findings(self) -> None:
        self.failure = gr.HTML(elem_id="failure")
        self.cautions = gr.HTML(elem_id="cautions")
        self.findings = gr.HTML(elem_id="found-out")

    def wire(self) -> None:
        clicks.on_row_click(self.head, self.selected)

    @property
    def moving(self) -> list[Block]:
        return [self.head, self.failure, self.cautions, self.findings]

    def gone(self, run_id: str) -> Updates:
        head: Updates = {self.head: head_html.gone(run_id, self.words)}
        return head | dict.fromkeys([self.failure, self.cautions, self.findings], "")

    def now(self, run: Run, view: CurveView) -> Updates:
        return {
            self.head: head_html.head(run, self.saves, self.words),
            self.failure: head_html.failure(run, self.words),
            self.cautions: head_html.cautions(run, self.words),
            self.findings: head_html.findings(run, self.words),
        }
