"""The list of evaluations; a click opens one."""

from __future__ import annotations

import gradio as gr

from engine.runs import runs
from webui import clicks, reports
from webui.evaluate_tab.panel import Panel
from webui.panels import Updates

MAX_EVALUATIONS_LISTED = 50


class ListPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("reports"), open=True, elem_classes="fold", elem_id="reports-fold"):
            self.html = gr.HTML(elem_id="reports", js_on_load=clicks.kept_rows_of("run"))

    def show(self, opened: str) -> Updates:
        """List the newest evaluations, with the open one marked."""
        evaluations = runs.find(self.saves, "evaluation")[:MAX_EVALUATIONS_LISTED]
        return {self.html: reports.listed(evaluations, opened or "", self.words)}
