"""The rows of a report with the answers of all models: sorting, searching and paging."""

from __future__ import annotations

from html import escape

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.evaluation import report
from engine.runs import runs
from webui import reports
from webui.evaluate_tab.panel import Panel
from webui.events import LATEST, QUIET
from webui.panels import Updates


class RowsPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Column(visible=False, elem_classes="report-rows-part") as self.part:
            with gr.Row(elem_classes="bar-row"):
                orders = [(words(f"order-{order}"), order) for order in report.ORDERS]
                self.order = gr.Dropdown(
                    orders,
                    value="asked",
                    show_label=False,
                    container=False,
                    elem_id="report-order",
                    interactive=True,
                    scale=0,
                    min_width=170,
                    label=words("report-order"),
                )
                self.text = gr.Textbox(
                    placeholder=words("report-search"),
                    show_label=False,
                    container=False,
                    max_lines=1,
                    elem_id="report-search",
                    scale=1,
                    label=words("report-search"),
                )
                self.back = gr.Button("‹", size="sm", scale=0, min_width=40, elem_id="report-back")
                self.where = gr.Textbox(
                    "1",
                    show_label=False,
                    container=False,
                    max_lines=1,
                    scale=0,
                    min_width=70,
                    elem_id="report-where",
                    label=words("report-page"),
                )
                self.on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="report-on")
                self.count = gr.HTML(elem_classes="report-count")
            self.html = gr.HTML(elem_id="report-rows")

    def wire(self) -> None:
        page, at = [self.where, self.count, self.html], [self.opened, *self.view]
        gr.on(
            [self.order.change, self.text.change],
            self.show,
            [self.opened, self.order, self.text],
            page,
            **LATEST,
        )
        self.where.submit(self.show, at, page, **LATEST)
        self.back.click(self.previous_page, at, page, **QUIET)
        self.on.click(self.next_page, at, page, **QUIET)

    @property
    def view(self) -> list[Block]:
        """The controls whose values `show` takes after the id."""
        return [self.order, self.text, self.where]

    @property
    def outputs(self) -> list[Block]:
        """The components that change when an evaluation is opened."""
        return [self.part, self.where, self.count, self.html]

    def show(self, id: str, order: str, text: str, number: str = "1") -> Updates:
        """Show a page of the rows that contain `text`."""
        try:
            run = runs.get(self.saves, id)
        except Refusal:
            return self._empty()
        summary = report.summary(run.dir)
        if not summary:
            return self._empty()
        page = report.page(run.dir, order, text or "", page_number(number))
        images = report.images(run.dir, {row["row"] for row in page.rows})
        total = f"{page.total:,}"
        count = (
            self.words("report-pages", pages=page.pages, total=total) if page.total else self.words("report-no-rows")
        )
        return {
            self.where: str(page.number),
            self.count: f'<p class="quiet">{escape(count)}</p>',
            self.html: reports.rows(page, summary["voices"], self.words, images),
        }

    def next_page(self, id: str, order: str, text: str, number: str) -> Updates:
        return self.show(id, order, text, str(page_number(number) + 1))

    def previous_page(self, id: str, order: str, text: str, number: str) -> Updates:
        return self.show(id, order, text, str(page_number(number) - 1))

    def closed(self) -> Updates:
        return {self.part: gr.update(visible=False)} | self._empty()

    def _empty(self) -> Updates:
        return {self.where: "1", self.count: "", self.html: ""}


def page_number(text: str) -> int:
    """The page number that was typed; 1 if it is not a number."""
    text = str(text or "").strip()
    return int(text) if text.isdecimal() and len(text) < 9 else 1
