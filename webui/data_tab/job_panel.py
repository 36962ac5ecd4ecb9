"""A data job in a separate process: starting it, watching it, and passing on its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.data import data_jobs
from engine.data.data_jobs import DataJob
from webui import notices
from webui.data_tab import findings_html
from webui.data_tab.data_folder import name_of
from webui.data_tab.panel import Context, Panel
from webui.events import QUIET
from webui.panels import Updates, hidden_value
from webui.people import acting

POLL_SECONDS = 0.7

OnDone = Callable[[DataJob, bool], Updates]  # the job, and whether its set is still open


class JobPanel(Panel):
    def __init__(self, context: Context):
        super().__init__(context)
        self.job_id = hidden_value()
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self.on_done: dict[str, OnDone] = {}
        self.done_outputs: list[Block] = []

    def layout(self) -> None:
        self.progress = gr.HTML(elem_id="work")

    @property
    def start_outputs(self) -> list[Block]:
        """The components that change when a job is started."""
        return [self.message, self.job_id, self.timer, self.progress]

    def when_done(self, what: str, handler: OnDone, outputs: Sequence[Block]) -> None:
        """Register how to show a job's result; `outputs` are the outputs of the handler."""
        self.on_done[what] = handler
        self.done_outputs += [output for output in outputs if output not in self.done_outputs]

    def wire(self) -> None:
        """To be called after the panels have registered what they do with results."""
        outputs = [self.message, self.timer, self.progress, *self.done_outputs]
        self.timer.tick(self.watch, [self.job_id, self.chosen], outputs, **QUIET)

    def start(self, right: str, what: str, of: str, owner: str | None = None, /, **settings: Any) -> Updates:
        """Start the job `what`, and watch it, if the person has the `right` to, an action of `engine.core.rights`; `of`
        says of what, and `owner` whose that is. Raises Refusal."""
        with acting(self.workplace.saves, right, of, owner):
            job = data_jobs.start(self.workplace.saves, what, {"data": str(self.folder.path), **settings})
        return {
            self.job_id: job.id,
            self.timer: gr.Timer(active=True),
            self.progress: findings_html.working(job.progress, self.words),
        }

    def start_on(self, right: str, id: str, what: str, **settings: Any) -> Updates:
        """Start a job about a saved set. Raises Refusal."""
        name = self.folder.saved_set(id).name
        return self.start(right, what, f"{what} {name}", name=name, **settings)

    def watch(self, job_id: str, id: str) -> Updates:
        """The progress of the job, and its result when it is done; `id` is what is open now."""
        job = data_jobs.get(self.workplace.saves, job_id)
        ended: Updates = {self.timer: gr.Timer(active=False), self.progress: ""}
        if job is None:
            return ended
        state = job.state
        if state == "working":
            return {self.progress: findings_html.working(job.progress, self.words)}
        if state == "failed":
            return ended | {self.message: notices.refused(job.problems, self.words)}
        # Readers who have opened another set stay there.
        here = job.arguments.get("name") in (None, name_of(id))
        return ended | self.on_done[job.id.partition("-")[0]](job, here)
