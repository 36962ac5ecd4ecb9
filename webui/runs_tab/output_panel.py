"""The output of the open run: its log, its model's answers, its settings and its files."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from engine.runs import samples
from engine.runs.runs import Run
from webui.panels import Updates
from webui.runs_tab import output_html, samples_html
from webui.runs_tab.panel import CurveView, Panel


class OutputPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Tabs(elem_classes="below"):
            with gr.Tab(words("log")):
                self.log = gr.HTML(elem_id="log")
                self.log_link = gr.HTML(elem_classes="under")
            with gr.Tab(words("samples"), visible=False) as self.samples_tab:
                self.samples = gr.HTML(elem_id="samples")
            with gr.Tab(words("settings-yaml")):
                self.settings = gr.HTML()
            with gr.Tab(words("files")):
                self.files = gr.HTML(elem_id="files")

    @property
    def moving(self) -> list[Block]:
        return [self.log, self.samples_tab, self.samples, self.files]

    @property
    def still(self) -> list[Block]:
        return [self.settings, self.log_link]

    def now(self, run: Run, view: CurveView) -> Updates:
        return {
            self.log: output_html.logs(run, self.words),
            self.samples_tab: gr.update(visible=run.dir.samples.exists()),
            self.samples: samples_html.samples(samples.latest(run.dir), self.words),
            self.files: output_html.files(run, self.context.root, self.words),
        }

    def gone(self, run_id: str) -> Updates:
        return {self.files: output_html.no_files(self.words), self.log_link: ""}

    def opened(self, run: Run) -> Updates:
        return {
            self.settings: output_html.settings(run, self.words)
            + output_html.script(run, self.context.workplace, self.context.root, self.words),
            self.log_link: output_html.log_links(run, self.context.root, self.words),
        }
