"""Opening a run, and refreshing it while it is in progress: every panel that shows something of it is updated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core import rundir
from engine.core.problems import Refusal
from engine.runs import engines, runs
from engine.runs.outcome import disk_is_full
from engine.runs.runs import Run
from webui import notices
from webui.panels import Updates, hidden_value
from webui.runs_tab.buttons_panel import ButtonsPanel
from webui.runs_tab.curves_panel import CurvesPanel
from webui.runs_tab.panel import Context, CurveView, Panel
from webui.runs_tab.table_panel import TablePanel
from webui.shared_answers import SharedAnswers

POLL_SECONDS = 2  # between two refreshes of the open run
ENDED_POLL_SECONDS = 10  # if it has ended: it can only be resumed or deleted, by somebody else


class RunView(Panel):
    """Shows the open run in place of the table, or the table; `panels` show the run, including `buttons` and
    `curves`."""

    def __init__(
        self, context: Context, table: TablePanel, buttons: ButtonsPanel, curves: CurvesPanel, panels: Sequence[Panel]
    ):
        super().__init__(context)
        self.table, self.buttons, self.curves, self.panels = table, buttons, curves, panels
        self.stamp = hidden_value("")  # of what is shown of the run
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self.shared = SharedAnswers()

    def layout(self) -> gr.Column:
        """The column that contains the panels."""
        self.column = gr.Column(visible=False, elem_classes="one-run")
        return self.column

    @property
    def view(self) -> list[Block]:
        """The inputs of `open` in addition to the id of the run."""
        return [*self.curves.view, self.table.search, self.table.limit]

    @property
    def moving(self) -> list[Block]:
        return [self.stamp, self.timer, *(output for panel in self.panels for output in panel.moving)]

    @property
    def still(self) -> list[Block]:
        return [output for panel in self.panels for output in panel.still]

    @property
    def outputs(self) -> list[Block]:
        """The outputs of `open`."""
        return [self.message, self.selected, self.column, *self.moving, *self.still, *self.table.outputs]

    def open(
        self, run_id: str, x: str, smoothing: float, log: bool, zoom: str, text: str | None, limit: str
    ) -> Updates:
        """The run with that id in full; the table if there is none."""
        if not run_id:
            return self.closed(text, limit)
        try:
            run = runs.get(self.saves, run_id)
        except Refusal as refusal:
            message = {self.message: notices.refused(refusal.problems, self.words), self.selected: ""}
            return message | self.closed(text, limit)
        updates = {self.column: gr.update(visible=True)} | self.table.hidden()
        for panel in self.panels:
            updates |= panel.opened(run)
        updates |= self.now(run, CurveView(x, smoothing, log, zoom))
        return updates | {self.timer: gr.Timer(poll_seconds(run), active=True)}

    def closed(self, text: str | None, limit: str) -> Updates:
        """Show the table in place of a run."""
        away = {self.column: gr.update(visible=False), self.timer: gr.Timer(active=False), self.stamp: ""}
        return away | self.buttons.without_questions() | self.table.shown(text, limit)

    def now(self, run: Run, view: CurveView) -> Updates:
        # Its timer is not set going: the reader may have left the tab meanwhile, where it rests.
        updates: Updates = {self.stamp: stamp_of(run), self.timer: gr.update(value=poll_seconds(run))}
        for panel in self.panels:
            updates |= panel.now(run, view)
        return updates

    def deleted(self, run_id: str) -> Updates:
        """What is shown stays, and nothing of it can be used."""
        updates: Updates = {self.timer: gr.Timer(active=False)}
        for panel in self.panels:
            updates |= panel.gone(run_id)
        return updates

    def catch_up(self, run_id: str, known: str, *view: Any) -> Updates:
        """What is shown is brought up to date, as the stamp `known` says what that is: the run with that id, or
        another."""
        if not run_id or not known.startswith(f"{run_id}//"):
            return self.open(run_id, *view)
        return self.tick(run_id, known, *view[: len(self.curves.view)])

    def tick(self, run_id: str, known: str, *view: Any) -> Updates:
        """What has changed since the stamp was `known`; nothing if nothing has."""
        try:
            run = runs.get(self.saves, run_id)
            if (stamp := stamp_of(run)) == known:
                return gr.skip()
            question = run_id, stamp, repr(view)
            return self.shared.get(question, lambda: self.now(run, CurveView(*view)))
        except Refusal:
            return self.deleted(run_id) if self.saves.is_dir() else gr.skip()
        except FileNotFoundError:  # a file was deleted meanwhile; the next refresh shows what is left
            return gr.skip()


def poll_seconds(run: Run) -> int:
    return ENDED_POLL_SECONDS if run.final else POLL_SECONDS


def stamp_of(run: Run) -> str:
    """A value that changes when anything that the page shows of the run does."""
    here = run.dir
    files = (
        here.progress,
        here.metrics,
        here.warnings,
        here.samples,
        *here.logs(),
        here.exit,
        here.error,
        here.report,
        here.probe,
        run.path,
    )
    waits_for_space = run.state == "queued" and disk_is_full(here)
    place = engines.place(run)
    waits = f"{place.number} {place.decision.text()}" if place else ""
    return f"{run.id}//{run.state} {waits} {engines.doubt(run) is None} {waits_for_space} {rundir.stamp(files)}"
