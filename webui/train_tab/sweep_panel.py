"""Several runs that differ in a few settings, started together from the form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.runs import sweeps
from webui import notices
from webui.events import LATEST, QUIET, changes
from webui.panels import Updates
from webui.people import acting
from webui.train_tab.panel import Context, Panel
from webui.train_tab.settings_panel import SettingsPanel
from webui.train_tab.summary_panel import rows_refused_by_template

USUAL_COUNT = 10
AXES = 3  # settings that can vary on the page; more on the command line
USUAL = ("training.learning_rate", "method.r", "training.num_train_epochs")  # the settings that are offered first


class SweepPanel(Panel):
    def __init__(self, context: Context, settings: SettingsPanel):
        super().__init__(context)
        self.settings = settings

    def layout(self) -> None:
        words = self.words
        named = [(words.label(path), path) for path in sweeps.settings()]
        with gr.Accordion(words("sweep"), open=False, elem_classes="fold", elem_id="sweep"):
            gr.HTML(f'<p class="told">{words("sweep-help")}</p>')
            self.axes: list[tuple[gr.Dropdown, gr.Textbox]] = []
            for number, usual in enumerate(USUAL[:AXES]):
                with gr.Row(elem_classes="axis"):
                    setting = gr.Dropdown(
                        named, value=usual, show_label=False, container=False, interactive=True, min_width=120,
                        label=words("sweep-setting"), elem_id=f"sweep-setting-{number}",
                    )  # fmt: skip
                    values = gr.Textbox(
                        placeholder=words("sweep-values"), show_label=False, container=False, max_lines=1,
                        min_width=120, label=words("sweep-values"), elem_id=f"sweep-values-{number}",
                    )  # fmt: skip
                self.axes.append((setting, values))
            self.order = gr.Radio(
                [(words(f"sweep-{order}"), order) for order in sweeps.ORDERS],
                value="grid", show_label=False, container=False, label=words("sweep"), elem_id="sweep-order",
            )  # fmt: skip
            with gr.Row():
                self.count = gr.Number(
                    USUAL_COUNT, label=words("sweep-count"), precision=0, minimum=1, maximum=sweeps.MAX_RUNS,
                    visible=False, min_width=120, elem_id="sweep-count",
                )  # fmt: skip
                self.budget = gr.Number(
                    None, label=words("sweep-budget"), minimum=0, min_width=120, elem_id="sweep-budget"
                )
            self.early_stop = gr.Checkbox(
                False, label=words("sweep-early-stop"), info=words("sweep-early-stop-help"), elem_id="sweep-early-stop"
            )
            self.start = gr.Button(
                words("sweep-start", count=0), interactive=False, elem_id="sweep-start", elem_classes="acts"
            )

    @property
    def inputs(self) -> list[Block]:
        """What determines the runs, without the form."""
        return [*(control for axis in self.axes for control in axis), self.order, self.count]

    def wire(self) -> None:
        shown = [self.start, self.count]
        gr.on(changes(self.inputs), self.look, self.inputs, shown, **LATEST)
        self.start.click(
            self.submit,
            [*self.inputs, self.budget, self.early_stop, *self.settings.inputs],
            [self.message, self.context.selected],
            **QUIET,
        )

    def look(self, *held: Any) -> Updates:
        """The number of runs, which needs no valid form."""
        try:
            count = len(sweeps.combinations(*self._axes(held)))
        except Refusal:
            count = 0
        return {
            self.start: gr.update(value=self.words("sweep-start", count=count), interactive=count > 0),
            self.count: gr.update(visible=held[2 * AXES] == "random"),
        }

    def submit(self, request: gr.Request, *held: Any) -> Updates:
        """Start all runs, or say what is wrong with the first that cannot start. The first is opened."""
        own, form = held[: len(self.inputs) + 2], held[len(self.inputs) + 2 :]
        *axes, budget, early_stop = own
        try:
            spec, problems = self.settings.read(form)
            with acting(self.workplace.saves, "start", f"sweep {spec.name}".strip()):
                if problems := problems or rows_refused_by_template(spec, self.workplace):
                    raise Refusal(problems)
                members = sweeps.submit(
                    sweeps.variants(spec, *self._axes(axes)), self.workplace, by=self.context.user(request),
                    budget_hours=budget or None, early_stop=bool(early_stop),
                )  # fmt: skip
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}
        done = notices.toast(self.words("sweep-started", count=len(members)))
        return {self.message: done, self.context.selected: members[0].id}

    def _axes(self, held: Sequence[Any]) -> tuple[dict[str, list[str]], str, int | None]:
        """The settings with their values, the order and the number of runs, from the controls. Raises Refusal."""
        *axes, order, count = held
        lines = [f"{path} = {values}" for path, values in zip(axes[::2], axes[1::2], strict=True) if values]
        return sweeps.read_axes(lines), order, int(count) if count else None
