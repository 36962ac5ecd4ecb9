"""What a model sees of the open set: its rows as tokens, how many there are, and how long a training would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Problem, Refusal
from engine.data import browse, preview_client, template_losses
from engine.data.datasets import Dataset
from engine.data.images import ImageSource
from engine.data.row_images import images_of
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.data_tab import tokens_html
from webui.data_tab.data_folder import Selection
from webui.data_tab.dataset_specs import preview_spec, stages_for
from webui.data_tab.panel import Context, Panel, row_number
from webui.data_tab.token_facts import token_facts
from webui.events import LATEST, QUIET
from webui.panels import Updates, hidden_value

ROWS_PER_PAGE = 5


class TokensPanel(Panel):
    """The Train tab's form provides everything that is not chosen here: `read_form` makes a spec of the values of
    `form_inputs`, `models` are the choices of a model."""

    def __init__(
        self,
        context: Context,
        form_inputs: Sequence[Block],
        read_form: Callable[[Sequence[Any]], RunSpec],
        models: Callable[[], list[tuple[str, str]]],
    ):
        super().__init__(context)
        self.form_inputs, self.read_form, self.models = form_inputs, read_form, models
        self.first = hidden_value()  # number of the first row of the page

    def layout(self) -> None:
        words = self.words
        with gr.Column(elem_classes="grid grid-4"):
            self.model = gr.Dropdown(
                [],
                value="",
                allow_custom_value=True,
                label=words.label("model.model_name_or_path"),
                elem_classes="field field-choice",
                elem_id="seen-model",
                interactive=True,
                min_width=120,
            )
            self.stage = gr.Dropdown(
                [],
                value=None,
                label=words.label("stage"),
                elem_classes="field field-choice",
                interactive=True,
                min_width=120,
            )
            self.max_length = gr.Textbox(
                label=words.label("data.max_length"),
                max_lines=1,
                elem_classes="field field-number",
                elem_id="seen-length",
                interactive=True,
                min_width=120,
            )
            self.template = gr.Textbox(
                label=words.label("model.chat_template"),
                placeholder=words("template-own"),
                max_lines=1,
                elem_classes="field field-choice",
                interactive=True,
                min_width=120,
            )
        self.numbers = gr.HTML(elem_id="seen-numbers")
        with gr.Row(elem_classes="bar-row"):
            self.back = gr.Button("‹", size="sm", scale=0, min_width=40)
            self.where = gr.Textbox(
                "1",
                show_label=False,
                container=False,
                max_lines=1,
                scale=0,
                min_width=110,
                elem_id="seen-where",
                label=self.words("rows-where"),
            )
            self.on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="seen-on")
        self.html = gr.HTML(elem_id="seen")

    def wire(self, tab: gr.Tab) -> None:
        """`tab` contains the panel."""
        settings = [self.model, self.stage, self.max_length, self.template]
        page = [self.first, self.where, self.html]
        asked_with = [*settings, *self.form_inputs]
        of_page = [self.chosen, self.first, *asked_with]
        of_set = [self.chosen, *asked_with]
        tab.select(self.show_settings, [self.chosen, *self.form_inputs], settings, **LATEST).then(
            self.show_rows, of_page, page, **LATEST
        ).then(self.show_numbers, of_set, self.numbers, **LATEST)
        changes = [
            self.model.input,
            self.stage.input,
            self.max_length.submit,
            self.max_length.blur,
            self.template.submit,
            self.template.blur,
        ]
        gr.on(changes, self.show_rows, of_page, page, **LATEST).then(self.show_numbers, of_set, self.numbers, **LATEST)
        self.where.submit(self.show_rows, [self.chosen, self.where, *asked_with], page, **LATEST)
        self.back.click(self.previous_page, of_page, page, **QUIET)
        self.on.click(self.next_page, of_page, page, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.numbers, self.html]

    def opened(self, selection: Selection) -> Updates:
        return self.closed()

    def closed(self) -> Updates:
        return {self.numbers: "", self.html: ""}

    def show_settings(self, id: str, *form_values: Any) -> Updates:
        """The settings of the form that matter here; a suitable stage for the open set if the form's is not."""
        spec = self.read_form(form_values)
        try:
            stages = stages_for(self.folder.saved_set(id))
        except Refusal:
            return gr.skip()
        stage = spec.stage.kind if spec.stage.kind in stages else (stages or [""])[0]
        labels = [(self.words.choice("stage", name), name) for name in stages]
        return {
            self.model: gr.update(choices=self.models(), value=spec.model.model_name_or_path),
            self.stage: gr.update(choices=labels, value=stage),
            self.max_length: str(spec.data.max_length),
            self.template: spec.model.chat_template or "",
        }

    def show_rows(
        self, id: str, number: str, model: str, stage: str, max_length: str, template: str, *form_values: Any
    ) -> Updates:
        """A page of rows as tokens, from a number on."""
        first = row_number(number)
        try:
            dataset = self.folder.saved_set(id)
            spec = self._spec(dataset, model, stage, max_length, template, form_values)
            answer = preview_client.ask("page", spec, self.folder.path, dataset.name, first=first, size=ROWS_PER_PAGE)
            html = tokens_html.tokens(answer, self.words, _images(dataset, first, answer))
        except Refusal as refusal:
            html = notices.listed(refusal.problems, self.words)
        return {self.first: str(first), self.where: str(first), self.html: html}

    def next_page(self, id: str, first: str, *values: Any) -> Updates:
        return self.show_rows(id, str(row_number(first) + ROWS_PER_PAGE), *values)

    def previous_page(self, id: str, first: str, *values: Any) -> Updates:
        return self.show_rows(id, str(max(row_number(first) - ROWS_PER_PAGE, 1)), *values)

    def show_numbers(
        self, id: str, model: str, stage: str, max_length: str, template: str, *form_values: Any
    ) -> Updates:
        """Lengths, rows left out, steps and time for the open set alone."""
        try:
            dataset = self.folder.saved_set(id)
            spec = self._spec(dataset, model, stage, max_length, template, form_values)
            statistics = preview_client.ask("statistics", spec, self.folder.path, dataset.name)
        except Refusal:
            return {self.numbers: ""}  # the rows below show why
        facts = token_facts(statistics, spec, self.workplace, self.words)
        notes = [
            *(Problem(reason["code"], reason["field"], reason["values"]) for reason in statistics["refused"]),
            *template_losses.notes(statistics["lost"], statistics["seen"]),
        ]
        lengths = tokens_html.lengths(statistics, facts, self.words)
        return {self.numbers: lengths + notices.noted(notes, self.words)}

    def _spec(
        self, dataset: Dataset, model: str, stage: str, max_length: str, template: str, form_values: Sequence[Any]
    ) -> RunSpec:
        """The form's spec with the choices made here. Raises Refusal."""
        settings = {
            "model.model_name_or_path": _text(model),
            "data.max_length": _text(max_length).strip(),
            "model.chat_template": _text(template).strip() or None,
        }
        spec = self.read_form(form_values)
        return preview_spec(spec, dataset, _text(stage), settings, self.workplace, self.words)


def _images(dataset: Dataset, first: int, answer: Mapping[str, Any]) -> dict[str, ImageSource]:
    """The images of the rows of an answer, by their identity."""
    if not any(side["images"] for row in answer["rows"] for side in row["sides"]):
        return {}
    rows = browse.page(dataset, first, ROWS_PER_PAGE)
    return {image.identity: image for row in rows if row.example for image in images_of(row.example)}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
