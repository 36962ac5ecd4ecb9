"""The curves of the chosen runs in one chart, and their tables; refreshed while any of the runs is in progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.runs import compare
from engine.runs.run import sweep_of
from engine.runs.runs import Run
from engine.runs.sweep_standing import best_among
from webui.compare_tab import figure_html, tables_html
from webui.compare_tab.comparison import compared
from webui.compare_tab.runs_panel import RunsPanel
from webui.compare_tab.view import View
from webui.compare_tab.view_panel import ViewPanel
from webui.events import LATEST, QUIET, of_tick
from webui.panels import Panel, Updates, hidden_value
from webui.shared_answers import SharedAnswers
from webui.words import Words

# page.js also writes the values into the address.
REMEMBER_JS = "(...held) => athanorCompare(held)"


class ComparisonPanel(Panel):
    """`timer` ticks while the tab is open and a run is in progress; `root` is the path prefix of the studio."""

    def __init__(
        self, words: Words, workplace: Workplace, root: str, timer: gr.Timer, runs: RunsPanel, view: ViewPanel
    ):
        self.words, self.saves, self.root = words, workplace.saves, root
        self.timer, self.runs, self.view = timer, runs, view
        self.shared = SharedAnswers()
        self.stamp = hidden_value()  # identifies the state of the runs that is shown

    def layout(self) -> None:
        self.chart = gr.HTML(elem_id="compare-chart")
        self.tables = gr.HTML(elem_id="compare-tables")

    def wire(self) -> None:
        runs, view = self.runs.runs, self.view
        changes = [
            runs.input,
            view.metric.input,
            view.x.input,
            view.log.input,
            view.by.input,
            view.smoothing.input,
            view.zoom.input,
        ]
        gr.on(changes, self.draw, self.inputs, self.outputs, js=REMEMBER_JS, **LATEST)
        self.timer.tick(self.tick, [self.stamp, *self.inputs], self.outputs, **QUIET)

    @property
    def inputs(self) -> list[Block]:
        """The controls for the runs and the view."""
        return [self.runs.runs, *self.view.inputs]

    @property
    def outputs(self) -> list[Block]:
        return [self.stamp, self.timer, self.runs.note, *self.view.outputs, self.chart, self.tables]

    def draw(self, ids: Sequence[str] | None, *controls: Any) -> Updates:
        """Show the chosen runs in their current state."""
        runs, gone = compare.select_runs(self.saves, ids or ())
        if not runs:
            return self._nothing(gone)
        known = compare.training_runs(self.saves) if any(map(sweep_of, runs)) else []
        comparison = compared(runs, View.of_controls(*controls), best_among(known, runs))
        count = compare.runs_of_sweep(runs, known)
        more = figure_html.note(self.words("compare-sweep-more", count=count, most=compare.MAX_RUNS_COMPARED))
        notes = {
            "compare-gone": gone,
            "compare-unread": comparison.titles_without_spec,
            "compare-without": comparison.titles_without_curve,
        }
        return {
            self.stamp: compare.stamp(runs),
            self.timer: gr.Timer(active=any(not run.final for run in runs)),
            self.runs.note: figure_html.notes(notes, self.words) + (more if count else ""),
            self.chart: figure_html.figure(comparison, self.root, self.words),
            self.tables: tables_html.tables(comparison, self.words),
            **self.view.for_comparison(comparison),
        }

    def _nothing(self, gone: Sequence[str]) -> Updates:
        note = figure_html.notes({"compare-gone": gone}, self.words) + figure_html.empty(self.words)
        return {
            self.stamp: "",
            self.timer: gr.Timer(active=False),
            self.runs.note: note,
            self.view.row: gr.update(visible=False),
            self.chart: "",
            self.tables: "",
        }

    def tick(self, stamp: str, ids: Sequence[str] | None, *controls: Any) -> Updates:
        """Show the runs again if they have changed since `stamp`."""
        try:
            runs, _ = compare.select_runs(self.saves, ids or ())
            if (now := compare.stamp(runs)) == stamp:
                return gr.skip()
            updates = self.shared.get((now, repr(ids), repr(controls)), lambda: self.draw(ids, *controls))
            return of_tick(self.timer, updates)
        except FileNotFoundError:  # a file was deleted meanwhile; the next tick will see what is left
            return gr.skip()

    # ---- entry points for the rest of the page

    def arrive(self, ids: Sequence[str] | None, *controls: Any) -> Updates:
        """Update the list of runs, and show the chosen ones."""
        return {**self.runs.refresh(ids), **self.draw(ids, *controls)}

    def from_address(self, query: str) -> Updates:
        """Set the controls to the runs and the view in an address; no updates if it names no runs."""
        parameters = parse_qs(query)
        ids = parameters.get("runs", [])[: compare.MAX_RUNS_COMPARED]
        return {**self.runs.choose(ids), **self.view.choose(View.of_address(parameters))} if ids else {}

    def with_siblings(self, run: Run) -> Updates:
        """Choose a run and the newest other runs of the same base and stage."""
        siblings = compare.siblings(run, compare.training_runs(self.saves))
        return {**self.runs.choose([sibling.id for sibling in siblings]), **self.view.choose(View())}
