"""The open evaluation: its progress, refreshed while it is running, and then its findings."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.blocks import Block

from engine.core import rundir
from engine.core.problems import Refusal
from engine.evaluation import report
from engine.runs import evaluations, runs
from engine.runs.runs import Run
from webui import clicks, reports
from webui.evaluate_tab.list_panel import ListPanel
from webui.evaluate_tab.panel import Context, Panel
from webui.evaluate_tab.right_answers_panel import RightAnswersPanel
from webui.evaluate_tab.rows_panel import RowsPanel
from webui.events import LATEST, QUIET, of_tick
from webui.panels import Updates, hidden_value

EVALUATION_POLL_SECONDS = 2  # how often a running evaluation is refreshed


class ReportPanel(Panel):
    def __init__(self, context: Context, listing: ListPanel, rows: RowsPanel, right_answers: RightAnswersPanel):
        super().__init__(context)
        self.listing, self.rows, self.right_answers = listing, rows, right_answers
        self.stamp = hidden_value("")  # identifies the state of the evaluation that is shown
        self.timer = gr.Timer(EVALUATION_POLL_SECONDS, active=False)

    def layout(self) -> None:
        title, help = self.words("report-none"), self.words("report-none-help")
        self.nothing = gr.HTML(f'<div class="empty"><b>{escape(title)}</b><p>{escape(help)}</p></div>')
        self.head = gr.HTML(elem_id="report-head")
        self.failure = gr.HTML()
        self.summary = gr.HTML(elem_id="report")

    def wire(self) -> None:
        listed = [self.listing.html, *self.outputs]
        clicks.on_row_click(self.listing.html, self.opened)
        self.opened.change(None, self.opened, None, js="(id) => { athanorReport(id, true); return []; }", **QUIET)
        # A click on the one that is open changes nothing, and is to bring it into view again.
        show_js = "() => { athanorReport(window.athanorClicked, true); return []; }"
        self.listing.html.select(None, None, None, js=show_js, **QUIET)
        # One event: the late answer of a refresh would show the evaluation that was open before.
        shown = [self.opened, self.stamp, *self.rows.view]
        gr.on([self.opened.change, self.timer.tick], self.catch_up, shown, listed, **LATEST)

    @property
    def outputs(self) -> list[Block]:
        return [
            self.stamp,
            self.timer,
            self.nothing,
            self.head,
            self.failure,
            self.summary,
            *self.rows.outputs,
            *self.right_answers.outputs,
        ]

    def open(self, id: str, order: str, text: str, number: str) -> Updates:
        """Show an evaluation and a page of its rows; nothing if there is none with the id."""
        try:
            run = runs.get(self.saves, id) if id else None
        except Refusal:
            run = None
        return self._opened(run, order, text, number) if run and run.kind == "evaluation" else self._closed()

    def _opened(self, run: Run, order: str, text: str, number: str) -> Updates:
        progress, state, failure = self.context.progress_of(run)
        summary = report.summary(run.dir)
        summary_html = ""
        if summary:
            notes = evaluations.notes_of(run, summary)
            summary_html = reports.summary(summary, self.words, notes) + self._downloads(run)
        return {
            self.stamp: stamp_of(run),
            self.timer: gr.Timer(active=not run.final),
            self.nothing: gr.update(visible=False),
            self.head: reports.head(run, progress, state, self.words),
            self.failure: failure,
            self.summary: summary_html,
            self.rows.part: gr.update(visible=bool(summary and summary["measures"])),
            **self.rows.show(run.id, order, text, number),
            **self.right_answers.show(summary),
        }

    def _closed(self) -> Updates:
        return {
            self.stamp: "",
            self.timer: gr.Timer(active=False),
            self.nothing: gr.update(visible=True),
            self.head: "",
            self.failure: "",
            self.summary: "",
            **self.rows.closed(),
            **self.right_answers.show(None),
        }

    def _downloads(self, run: Run) -> str:
        address = f"{self.context.root}/download/{quote(run.id)}/report"
        links = "".join(
            f'<a class="load" download href="{escape(f"{address}/{file}")}">'
            f"{escape(self.words('report-download', kind=file.rpartition('.')[2].upper()))}</a> "
            for file in report.files(run.dir)
        )
        return f'<p class="loads">{links}</p>'

    def tick(self, id: str, stamp: str, *view: Any) -> Updates:
        """Show the evaluation again if it has changed since `stamp`."""
        try:
            if stamp_of(runs.get(self.saves, id)) == stamp:
                return gr.skip()
            return self.listing.show(id) | of_tick(self.timer, self.open(id, *view))
        except Refusal:
            return self._closed()
        except FileNotFoundError:  # it was deleted meanwhile
            return gr.skip()

    def catch_up(self, id: str, stamp: str, order: str, text: str, number: str) -> Updates:
        """What is shown is brought up to date, as `stamp` says what that is: the evaluation with the id, or another,
        which is opened at its first page."""
        if id and stamp.startswith(f"{id}|"):
            return self.tick(id, stamp, order, text, number)
        return self.listing.show(id) | self.open(id, order, text, "1")


def stamp_of(run: Run) -> str:
    """A text that changes whenever what is shown of an evaluation does."""
    return "|".join([run.id, run.state, rundir.stamp((run.dir.progress, run.dir.exit, run.dir.report))])
