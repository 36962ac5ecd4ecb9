"""All runs in a table, newest first, with a search."""

from __future__ import annotations

import hashlib

import gradio as gr
from gradio.blocks import Block

from engine.runs import runs
from engine.runs.sweep_standing import best_among
from webui import clicks
from webui.events import LATEST, QUIET
from webui.panels import Updates, hidden_value
from webui.runs_tab import table_html
from webui.runs_tab.panel import Context, Panel
from webui.runs_tab.run_facts import matches

TABLE_ROWS = 100  # runs in the table before "show more"
POLL_SECONDS = 4  # between two refreshes of the table


class TablePanel(Panel):
    def __init__(self, context: Context):
        super().__init__(context)
        self.stamp = hidden_value()  # of the table that is shown
        self.timer = gr.Timer(POLL_SECONDS, active=False)

    def layout(self) -> None:
        words = self.words
        with gr.Column(elem_classes="list") as self.column:
            with gr.Row(elem_classes="bar-row"):
                self.search = gr.Textbox(
                    placeholder=words("runs-search"),
                    label=words("runs-search"),
                    show_label=False,
                    container=False,
                    elem_id="search",
                    max_lines=1,
                    scale=1,
                )
            self.table = gr.HTML(js_on_load=clicks.row_click_js("run"), elem_id="runs")
            self.limit = hidden_value(str(TABLE_ROWS))  # number of rows
            self.more = gr.Button(words("runs-more", count=0), size="sm", visible=False, elem_id="runs-more")

    def wire(self) -> None:
        view = [self.search, self.limit]
        # The same event, so that a late refresh is not of what was searched for before.
        gr.on([self.timer.tick, self.search.change], self.refresh, [self.stamp, *view], self.listed, **LATEST)
        self.more.click(self.list_more, view, [self.limit, *self.listed], **QUIET)
        clicks.on_row_click(self.table, self.selected)

    @property
    def listed(self) -> list[Block]:
        """The components that change when the list of runs is refreshed."""
        return [self.stamp, self.table, self.more]

    @property
    def outputs(self) -> list[Block]:
        """The components that change when the table is shown or hidden."""
        return [self.column, self.timer, *self.listed]

    def shown(self, text: str | None, limit: str) -> Updates:
        """Show the table in place of a run."""
        here = {self.column: gr.update(visible=True), self.timer: gr.Timer(active=True)}
        return here | self.list_runs(text, limit)

    def hidden(self) -> Updates:
        return {self.column: gr.update(visible=False), self.timer: gr.Timer(active=False)}

    def list_runs(self, text: str | None, limit: str) -> Updates:
        """The runs that match, and whether there are more of them."""
        text = text or ""  # an untouched box has no value at all
        known, count = runs.find(self.saves), row_limit(limit)
        matching = [run for run in known if matches(run, text)]
        best = best_among(known, matching[:count])
        html = table_html.table(matching[:count], self.words, text, best)
        older = max(len(matching) - count, 0)
        return {
            self.stamp: hashlib.sha1(html.encode()).hexdigest(),
            self.table: html,
            self.more: gr.update(visible=older > 0, value=self.words("runs-more", count=older)),
        }

    def refresh(self, known: str, text: str | None, limit: str) -> Updates:
        """The table if it differs from the one with the stamp `known`."""
        try:
            updates = self.list_runs(text, limit)
        except FileNotFoundError:  # a run was deleted meanwhile
            return gr.skip()
        return gr.skip() if updates[self.stamp] == known else updates

    def list_more(self, text: str | None, limit: str) -> Updates:
        limit = str(row_limit(limit) + TABLE_ROWS)
        return {self.limit: limit} | self.list_runs(text, limit)


def row_limit(limit: str) -> int:
    """The number of rows to show; the page's default if the value is invalid."""
    return min(int(limit), 100_000) if limit.isdecimal() and len(limit) < 9 else TABLE_ROWS
