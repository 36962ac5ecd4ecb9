"""The button that converts the chosen model once, where it cannot be trained as it is: GGUF, pickled or quantized."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal, problem
from engine.data import data_jobs
from engine.models.conversion import convertible, offered
from engine.spec.model_settings import Model
from webui import notices
from webui.events import QUIET
from webui.panels import Updates, hidden_value, refusal_as_message
from webui.people import acting
from webui.train_tab.panel import Context, Panel

POLL_SECONDS = 1


class ConversionPanel(Panel):
    """`layout` is below the model; job and timer are created with the panel, outside of what may be hidden."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.job_id, self.source = hidden_value(), hidden_value()  # the job, and the model that it converts
        self.timer = gr.Timer(POLL_SECONDS, active=False)

    def layout(self) -> None:
        label = self.words("convert-gguf")
        self.button = gr.Button(label, size="sm", visible=False, elem_id="convert", elem_classes="acts")
        self.progress = gr.HTML(elem_classes="facts")

    def wire(self, model: Any) -> None:
        """`model` is the control for the model, which is set to the result."""
        self.model = model
        outputs: list[Block] = [self.message, self.job_id, self.source, self.timer, self.progress]
        self.button.click(self.start, model, outputs, **QUIET)
        watched = [self.job_id, self.source, model]
        self.timer.tick(self.watch, watched, [self.message, self.timer, self.progress, model], **QUIET)

    def offer(self, model: Model) -> Updates:
        """Show the button if the chosen model can be converted, and has to be for what is chosen next to it."""
        source = offered(model.model_name_or_path, self.workplace.model_roots)
        if source and source.kind == "quantized" and model.quantization.kind == "none":
            source = None  # it is dequantized whenever it is loaded
        label = self.words(f"convert-{source.kind}") if source else ""
        return {self.button: gr.update(visible=True, value=label) if source else gr.update(visible=False)}

    @refusal_as_message
    def start(self, name_or_path: str) -> Updates:
        """Start the conversion in a child process, and watch it. Raises Refusal."""
        source = convertible(name_or_path or "", self.workplace.model_roots)
        if source is None:
            roots = ", ".join(map(str, self.workplace.model_roots))
            raise Refusal(problem("convert-nothing", given=name_or_path or "", roots=roots))
        paths = {"file": str(source.file), "target": str(source.target)}
        with acting(self.workplace.saves, "convert", source.file.name):
            job = data_jobs.start(self.workplace.saves, "convert", paths)
        started = {self.job_id: job.id, self.source: name_or_path}
        return started | {self.timer: gr.Timer(active=True), self.progress: self._working({})}

    def watch(self, job_id: str, source: str, chosen: str) -> Updates:
        """The progress of the conversion; when it is done, its result as the chosen model, unless another one has been
        chosen meanwhile."""
        job = data_jobs.get(self.workplace.saves, job_id)
        if job is not None and job.state == "working":
            return {self.progress: self._working(job.progress)}
        ended: Updates = {self.timer: gr.Timer(active=False), self.progress: ""}
        if job is None:
            return ended
        if job.state == "failed":
            return ended | {self.message: notices.refused(job.problems, self.words)}
        folder = job.result["folder"]
        if chosen != source:
            return ended | {self.message: notices.toast(self.words("converted-only", folder=folder))}
        return ended | {self.model: folder, self.message: notices.toast(self.words("converted", folder=folder))}

    def _working(self, progress: Any) -> str:
        text = self.words("converting", done=progress.get("done", 0) + 1, total=progress.get("total") or 3)
        return f'<p class="quiet" role="status">{escape(text)}</p>'
