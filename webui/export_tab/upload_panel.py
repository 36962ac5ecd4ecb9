"""Uploading an export to a hub, on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.runs import publish, runs
from engine.runs.runs import Run
from webui import notices
from webui.events import concurrent
from webui.export_tab.panel import Panel
from webui.numbers import moment
from webui.panels import Updates
from webui.people import acting, hindrance

MAX_CONCURRENT_UPLOADS = 2  # at once: each holds a thread


class UploadPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with (
            gr.Column(elem_classes="folds", visible=False) as self.column,
            gr.Accordion(words("upload-hub"), open=False, elem_classes="fold", elem_id="upload-hub"),
        ):
            gr.HTML(f'<p class="quiet">{escape(words("publish-help"))}</p>')
            with gr.Column(elem_classes="grid grid-3"):
                self.which = gr.Dropdown(
                    [],
                    value=None,
                    label=words("upload-which"),
                    elem_id="upload-which",
                    elem_classes="field field-choice",
                    interactive=True,
                )
                self.repo = gr.Textbox(
                    label=words("upload-repo"),
                    placeholder="owner/name",
                    max_lines=1,
                    elem_id="upload-repo",
                    elem_classes="field field-number",
                )
                self.token = gr.Textbox(
                    label=words("upload-token"),
                    type="password",
                    max_lines=1,
                    elem_id="upload-token",
                    elem_classes="field field-number",
                )
                self.private = gr.Checkbox(True, label=words("upload-private"), elem_id="upload-private")
            with gr.Row(elem_classes="buttons"):
                self.button = gr.Button(words("upload-start"), size="sm", elem_id="upload-start", elem_classes="acts")
            self.status = gr.HTML(elem_id="uploaded")

    def wire(self) -> None:
        self.button.click(
            self.send,
            [self.which, self.repo, self.token, self.private],
            [self.status, self.token, self.button],
            **concurrent("uploads", MAX_CONCURRENT_UPLOADS),
        )

    @property
    def outputs(self) -> list[Block]:
        """The components that change with the list of exports."""
        return [self.column, self.which]

    def offering(self, export_runs: Sequence[Run]) -> Updates:
        """The finished ones of these that the person may upload as choices; nothing if there are none."""
        done = [
            (f"{run.title} · {moment(run.submitted)}", run.id)
            for run in export_runs
            if run.final and run.dir.result() and not hindrance("publish", run.by)
        ]
        return {self.column: gr.update(visible=bool(done)), self.which: gr.update(choices=done)}

    def send(
        self, request: gr.Request, id: str | None, repo: str | None, token: str | None, private: bool
    ) -> Iterator[Updates]:
        """Upload an export. The token is sent with the click, and its box is cleared immediately."""
        uploading = escape(self.words("uploading", repo=repo or ""))
        yield {
            self.status: f'<p class="told">{uploading}</p>',
            self.token: "",
            self.button: gr.update(interactive=False),
        }
        try:
            run = runs.get(self.saves, id or "")
            with acting(self.saves, "publish", f"{run.id} → {repo or ''}", run.by):
                published = publish.publish(run, repo or "", token or "", private=bool(private), by=self.user(request))
            uploaded = escape(self.words("uploaded", url=published["url"]))
            status = f'<p class="state right">{uploaded}</p>'
        except Refusal as refusal:
            status = notices.listed(refusal.problems, self.words)
        yield {self.status: status, self.token: "", self.button: gr.update(interactive=True)}
