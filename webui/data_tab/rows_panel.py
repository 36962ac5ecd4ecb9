"""The rows of the open set, page by page, and a search in them."""

from __future__ import annotations

from html import escape

import gradio as gr
from gradio.blocks import Block

from engine.data import browse
from engine.data.datasets import Dataset
from webui.data_tab import rows_html
from webui.data_tab.data_folder import Selection
from webui.data_tab.panel import Context, Panel, row_number
from webui.events import LATEST, QUIET
from webui.panels import Updates, hidden_value, refusal_as_message

ROWS_PER_PAGE = 10
SEARCHED = "0"  # where a search continues after the end of the set


class RowsPanel(Panel):
    def __init__(self, context: Context):
        super().__init__(context)
        self.first = hidden_value()  # number of the first row of the page, or of the first one searched
        self.searched_to = hidden_value()  # number of the last row searched; "" = no search

    def layout(self) -> None:
        with gr.Row(elem_classes="bar-row"):
            self.text = gr.Textbox(
                placeholder=self.words("rows-search"),
                label=self.words("rows-search"),
                show_label=False,
                container=False,
                max_lines=1,
                elem_id="search-rows",
                scale=1,
            )
            self.back = gr.Button("‹", size="sm", scale=0, min_width=40, elem_id="rows-back")
            self.where = gr.Textbox(
                "1",
                show_label=False,
                container=False,
                max_lines=1,
                scale=0,
                min_width=110,
                elem_id="rows-where",
                label=self.words("rows-where"),
            )
            self.on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="rows-on")
        self.html = gr.HTML(elem_id="rows")
        self.further = gr.Button(self.words("search-on"), size="sm", visible=False, elem_id="search-on")

    def wire(self) -> None:
        page = [self.message, self.first, self.searched_to, self.where, self.html, self.further]
        turned_from = [self.chosen, self.first, self.searched_to, self.text]
        self.text.submit(self.search, [self.chosen, self.text], page, **LATEST)
        self.where.submit(self.show, [self.chosen, self.where, self.text], page, **LATEST)
        self.back.click(self.previous_page, turned_from, page, **QUIET)
        gr.on([self.on.click, self.further.click], self.next_page, turned_from, page, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.text, self.first, self.searched_to, self.where, self.html, self.further]

    def opened(self, selection: Selection) -> Updates:
        if selection.readable:
            return {self.text: ""} | self.page(selection.dataset, 1, "")
        hidden = gr.update(visible=False)
        return {self.text: "", self.searched_to: "", self.where: "1", self.html: "", self.further: hidden}

    def closed(self) -> Updates:
        return {self.text: ""}

    def page(self, dataset: Dataset, number: int, text: str) -> Updates:
        """Rows from a number on, or the following ones that contain a text."""
        if text.strip():
            rows, last = browse.search(dataset, text, number - 1, ROWS_PER_PAGE)
            html = rows_html.page(rows, self.words, text) if rows else self._no_match(text, number, last)
            searched_to, more = str(last or SEARCHED), last is not None
        else:
            rows = browse.page(dataset, number, ROWS_PER_PAGE)
            html = rows_html.page(rows, self.words) if rows else _empty(self.words("rows-end"))
            searched_to, more = "", False
        return {
            self.first: str(number),
            self.searched_to: searched_to,
            self.where: str(number),
            self.html: html,
            self.further: gr.update(visible=more),
        }

    def _no_match(self, text: str, number: int, last: int | None) -> str:
        if last:
            return _empty(self.words("rows-not-yet", count=f"{last:,}"))
        return _empty(self.words("rows-no-match" if number == 1 else "rows-no-more", text=text.strip()))

    @refusal_as_message
    def show(self, id: str, number: str, text: str) -> Updates:
        return self.page(self.folder.select(id).dataset, row_number(number), text or "")

    def search(self, id: str, text: str) -> Updates:
        return self.show(id, "1", text)

    def next_page(self, id: str, first: str, searched_to: str, text: str) -> Updates:
        """The next page; during a search, further hits."""
        if not (text or "").strip():
            return self.show(id, str(row_number(first) + ROWS_PER_PAGE), "")
        if searched_to == SEARCHED:
            return gr.skip()
        return self.show(id, str(row_number(searched_to) + 1) if searched_to else "1", text)

    def previous_page(self, id: str, first: str, searched_to: str, text: str) -> Updates:
        """The previous page; during a search, the first hits."""
        if (text or "").strip():
            return self.search(id, text)
        return self.show(id, str(max(row_number(first) - ROWS_PER_PAGE, 1)), "")


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'
