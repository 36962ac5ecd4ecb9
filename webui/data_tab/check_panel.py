"""Checking the whole set: rows that cannot be used, unusual rows, and rows that are also in other sets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.data import data_jobs
from engine.data.data_jobs import DataJob
from webui import notices
from webui.data_tab import findings_html
from webui.data_tab.data_folder import Selection, bytes_of, unsaved
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context, Panel
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import hindrance

MAX_BYTES_UNASKED = 100_000_000  # rows of a set that is checked as soon as the panel is shown


class CheckPanel(Panel):
    def __init__(self, context: Context, jobs: JobPanel):
        super().__init__(context)
        self.jobs = jobs

    def layout(self) -> None:
        words = self.words
        with gr.Row(elem_classes="tools-row"):
            self.against = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                label=words("against"),
                info=words("against-help"),
                elem_classes="field field-names",
                scale=3,
                elem_id="against",
            )
            self.check_button = gr.Button(
                words("check-all"), size="sm", scale=0, min_width=140, elem_id="check-all", elem_classes="acts"
            )
        self.findings = gr.HTML(elem_id="found")

    def wire(self, tab: gr.Tab) -> None:
        """`tab` contains the panel."""
        self.jobs.when_done("check", self.checked, [self.findings])
        settings = [self.chosen, self.against]
        self.check_button.click(self.check, settings, self.jobs.start_outputs, **QUIET)
        tab.select(self.check_unasked, settings, self.jobs.start_outputs, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.against, self.findings]

    def opened(self, selection: Selection) -> Updates:
        others = [name for name in self.folder.sound_names() if name != selection.dataset.name]
        if selection.is_set:
            html = self._known_findings(selection.name)
        else:
            html = notices.listed([unsaved(selection)], self.words)
        return {self.against: gr.update(choices=others, value=[]), self.findings: html}

    def closed(self) -> Updates:
        return {self.findings: ""}

    @refusal_as_message
    def check(self, id: str, against: Sequence[str] | None) -> Updates:
        """Start checking a set; `against` are sets that must not share rows with it."""
        return self.jobs.start_on("check-data", id, "check", **self._settings(against))

    def check_unasked(self, id: str, against: Sequence[str] | None) -> Updates:
        """Check a small set without being asked."""
        try:
            small = not hindrance("check-data") and bytes_of(self.folder.saved_set(id)) <= MAX_BYTES_UNASKED
        except Refusal:
            small = False
        return self.check(id, against) if small else gr.skip()

    def checked(self, job: DataJob, here: bool) -> Updates:
        return {self.findings: self._findings(job)} if here else {}

    def _known_findings(self, name: str) -> str:
        """The result of an earlier check of exactly this data; otherwise a hint what a check can find."""
        settings = {"data": str(self.folder.path), "name": name, **self._settings([])}
        job = data_jobs.find_finished(self.workplace.saves, "check", settings)
        return self._findings(job) if job else f'<p class="quiet">{escape(self.words("check-help"))}</p>'

    def _settings(self, against: Sequence[str] | None) -> dict[str, Any]:
        return {"against": list(against or []), "language": self.words.language}

    def _findings(self, job: DataJob) -> str:
        bad_rows = f"{self.context.root}/data/{quote(job.id)}/{data_jobs.BAD_ROWS_FILE}"
        return findings_html.findings(job.result, bad_rows, self.words)
