"""The curves of the open run, and how they are drawn."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.core.smoothing import SMOOTHING
from engine.core.stages import STAGES
from engine.runs import progress, runs
from engine.runs.runs import Run
from webui import charts
from webui.events import LATEST, changes
from webui.panels import Updates, hidden_value
from webui.runs_tab.panel import CurveView, Panel
from webui.runs_tab.run_facts import run_facts


class CurvesPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Row(elem_classes="chart-tools") as self.tools:
            self.x = gr.Radio(
                [(words(f"x-{axis}"), axis) for axis in charts.AXES],
                value="step",
                label=words("x-axis"),
                elem_classes="field-union",
                scale=0,
                min_width=340,
            )
            self.smoothing = gr.Slider(0, 0.99, SMOOTHING, step=0.01, label=words("smoothing"), scale=0, min_width=260)
            self.log = gr.Checkbox(False, label=words("log-scale"), scale=0, min_width=140)
        self.html = gr.HTML(elem_id="curves")
        # page.js writes the selected part of the axis into it.
        self.zoom = hidden_value("", elem_id="curves-zoom", by_reader=True)

    @property
    def view(self) -> list[Block]:
        """The controls that hold a `CurveView`."""
        return [self.x, self.smoothing, self.log, self.zoom]

    def wire(self) -> None:
        gr.on(changes(self.view), self.redraw, [self.selected, *self.view], self.html, **LATEST)

    @property
    def moving(self) -> list[Block]:
        return [self.tools, self.html]

    def now(self, run: Run, view: CurveView) -> Updates:
        return {self.tools: gr.update(visible=run.kind == "training"), self.html: self._draw(run, view)}

    def gone(self, run_id: str) -> Updates:
        return {self.tools: gr.update(visible=False)}

    def redraw(self, run_id: str, *view: Any) -> Updates:
        try:
            run = runs.get(self.saves, run_id)
        except Refusal:
            return gr.skip()
        return {self.html: self._draw(run, CurveView(*view))}

    def _draw(self, run: Run, view: CurveView) -> str:
        if run.kind != "training":
            return ""
        stage = STAGES.get(run_facts(run)["stage"])
        first = stage.curves if stage else ()
        return charts.charts(
            progress.curves(run),
            self.words,
            view.x,
            view.smoothing,
            view.log,
            first,
            charts.part_of(view.zoom, view.x),
        )
