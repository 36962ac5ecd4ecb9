"""Settings that are seldom changed: the name of the evaluation, and how answers are sampled."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.evaluation.evaluation_spec import EvaluationSpec
from webui import boxes
from webui.evaluate_tab.panel import Panel, Values
from webui.panels import Updates


class SamplingPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("more"), open=False, elem_classes="fold"):
            self.name = gr.Textbox(label=words("evaluate-name"), max_lines=1, elem_classes="field", interactive=True)
            with gr.Column(elem_classes="grid grid-2"):
                self.temperature = self.number("temperature", "0", info=words("evaluate-temperature-help"))
                self.top_p = self.number("top-p", "1")
            with gr.Column(elem_classes="grid grid-2"):
                self.samples = self.number("samples", "1", info=words("evaluate-samples-help"))
                self.batch_size = self.number("batch", "16")
            with gr.Column(elem_classes="grid grid-2"):
                self.seed = self.number("seed", "42")

    @property
    def inputs(self) -> list[Block]:
        return [self.name, self.temperature, self.top_p, self.seed, self.samples, self.batch_size]

    # ---- part of the spec

    def read_name(self, values: Values) -> str:
        return (values[self.name] or "").strip()

    def read_data(self, values: Values) -> dict[str, Any]:
        """The seed also selects the rows."""
        return boxes.typed_values({"seed": values[self.seed]})

    def read_generation(self, values: Values) -> dict[str, Any]:
        return boxes.typed_values(
            {
                "temperature": values[self.temperature],
                "top_p": values[self.top_p],
                "seed": values[self.seed],
                "samples": values[self.samples],
                "batch_size": values[self.batch_size],
            }
        )

    def fill(self, spec: EvaluationSpec) -> Updates:
        settings = spec.generation
        return {
            self.name: spec.name,
            self.temperature: f"{settings.temperature:g}",
            self.top_p: f"{settings.top_p:g}",
            self.seed: f"{spec.data.seed:g}",
            self.samples: f"{settings.samples:g}",
            self.batch_size: f"{settings.batch_size:g}",
        }
