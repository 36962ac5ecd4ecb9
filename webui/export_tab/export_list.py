"""The list of exports: their progress and their results."""

from __future__ import annotations

import hashlib

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.export.export_spec import ExportSpec
from engine.runs import runs
from webui import clicks, notices
from webui.events import QUIET, of_tick
from webui.export_tab import exports_html
from webui.export_tab.panel import Context, Panel
from webui.export_tab.upload_panel import UploadPanel
from webui.panels import Updates, hidden_value
from webui.people import acting

POLL_SECONDS = 2  # between two refreshes of exports in progress
MAX_EXPORTS_LISTED = 12

USE_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-use], [data-retry]');
  if (button) trigger('select', button.dataset.use ? { run: button.dataset.use } : { retry: button.dataset.retry });
});
"""


class ExportList(Panel):
    """A `select` event of `html` names an export to be used in the form of the Train tab, or one whose last step is to
    be repeated."""

    def __init__(self, context: Context, uploads: UploadPanel):
        super().__init__(context)
        self.uploads = uploads
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self.stamp = hidden_value()  # of the list that is shown

    def layout(self) -> None:
        self.html = gr.HTML(js_on_load=USE_JS + clicks.keep_folds_js("export"), elem_id="exports")

    def wire(self) -> None:
        self.html.select(self.retry, None, [self.message, *self.outputs], **QUIET)
        self.timer.tick(self.tick, self.stamp, self.outputs, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.stamp, self.html, self.timer, *self.uploads.outputs]

    def listed(self) -> Updates:
        """The current exports, and whether there is something to wait for."""
        export_runs = runs.find(self.saves, ExportSpec.kind)[:MAX_EXPORTS_LISTED]
        html = exports_html.listed(export_runs, self.context.root, self.words)
        return {
            self.stamp: hashlib.sha1(html.encode()).hexdigest(),
            self.html: html,
            self.timer: gr.Timer(active=any(not run.final for run in export_runs)),
        } | self.uploads.offering(export_runs)

    def tick(self, known: str) -> Updates:
        """The list if it differs from the one with the stamp `known`."""
        try:
            updates = self.listed()
        except FileNotFoundError:  # a file was deleted meanwhile; the next refresh shows what is left
            return gr.skip()
        return gr.skip() if updates[self.stamp] == known else of_tick(self.timer, updates)

    def retry(self, request: gr.Request, event: gr.EventData) -> Updates:
        """Repeat the failed step of an export. Clicks on other buttons are ignored."""
        id = event._data.get("retry")
        if not id:
            return gr.skip()
        try:
            run = runs.get(self.saves, str(id))
            with acting(self.saves, "resume", run.id, run.by):
                runs.resume(run, by=self.user(request), data=self.context.workplace.data)
            message = notices.toast(self.words("started"))
        except Refusal as refusal:
            message = notices.refused(refusal.problems, self.words)
        return {self.message: message} | self.listed()
