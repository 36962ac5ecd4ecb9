"""The controls for how the compared runs are shown: a View."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from engine.core.smoothing import SMOOTHING
from engine.runs import compare
from webui import charts
from webui.compare_tab.comparison import Comparison
from webui.compare_tab.view import MAX_SMOOTHING, View
from webui.panels import Panel, Updates, hidden_value
from webui.words import Words


class ViewPanel(Panel):
    def __init__(self, words: Words):
        self.words = words

    def layout(self) -> None:
        words = self.words
        with gr.Row(elem_classes="chart-tools", visible=False) as self.row:
            self.metric = gr.Dropdown(
                [], value=None, label=words("compare-metric"), elem_id="compare-metric", interactive=True, min_width=220
            )
            self.by = gr.Dropdown(
                [], value=None, label=words("compare-group"), elem_id="compare-by", interactive=True, min_width=180
            )
            self.x = gr.Radio(
                [(words(f"x-{axis}"), axis) for axis in charts.AXES],
                value="step",
                label=words("x-axis"),
                elem_classes="field-union",
                elem_id="compare-x",
                scale=0,
                min_width=300,
            )
            self.smoothing = gr.Slider(
                0, MAX_SMOOTHING, SMOOTHING, step=0.01, label=words("smoothing"), scale=0, min_width=220
            )
            self.log = gr.Checkbox(False, label=words("log-scale"), scale=0, min_width=120, elem_id="compare-log")

        # page.js writes the part of the axis into it that the user drags over.
        self.zoom = hidden_value("", elem_id="compare-zoom", by_reader=True)

    @property
    def inputs(self) -> list[Block]:
        """In the order of the parameters of View.of_controls, and of the address in page.js."""
        return [self.metric, self.x, self.smoothing, self.log, self.by, self.zoom]

    @property
    def outputs(self) -> list[Block]:
        """The components that depend on the chosen runs."""
        return [self.row, self.metric, self.by]

    def for_comparison(self, comparison: Comparison) -> Updates:
        """Offer the curves that the runs have and the settings that they can be grouped by."""
        metrics, view = comparison.metrics, comparison.view
        curves = [(charts.title(name, self.words), name) for name in metrics]
        groups = [
            (self.words("compare-group-none"), ""),
            (self.words("compare-group-name"), compare.BY_NAME),
            *((self.words.label(difference.path), difference.path) for difference in comparison.differences),
        ]
        return {
            self.row: gr.update(visible=bool(metrics)),
            self.metric: gr.update(choices=curves, value=view.metric or None),
            self.by: gr.update(choices=groups, value=view.by),
        }

    def choose(self, view: View) -> Updates:
        """Set the controls to a view, before the runs have been read."""
        alone = {self.metric: view.metric, self.by: view.by}
        chosen: Updates = {
            control: gr.update(choices=[(value, value)], value=value) for control, value in alone.items() if value
        }
        return {self.x: view.x, self.smoothing: view.smoothing, self.log: view.log, self.zoom: view.zoom, **chosen}
