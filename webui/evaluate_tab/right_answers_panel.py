"""Making a data set of the right answers of one of the evaluated models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.data import owners
from engine.evaluation.right_answers import COMPARISONS, save_right_answers
from engine.runs import runs
from webui import notices
from webui.evaluate_tab.panel import Panel
from webui.events import QUIET
from webui.panels import Updates
from webui.people import acting, asking


class RightAnswersPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Accordion(
            words("right-answers"), open=False, visible=False, elem_classes="fold", elem_id="right-answers"
        ) as self.part:
            gr.HTML(f'<p class="quiet">{words("right-answers-help")}</p>')
            with gr.Row():
                self.model = gr.Dropdown(
                    [], label=words("right-answers-model"), elem_id="right-answers-model", interactive=True
                )
                ways = [(words(f"right-answers-{way}"), way) for way in COMPARISONS]
                self.comparison = gr.Dropdown(
                    ways, value="exact", label=words("right-answers-by"), elem_id="right-answers-by", interactive=True
                )
            self.save = gr.Button(
                words("right-answers-save"), size="sm", elem_id="right-answers-save", elem_classes="acts"
            )

    def wire(self) -> None:
        inputs = [self.opened, self.model, self.comparison]
        self.save.click(self.save_answers, inputs, [self.message], **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.part, self.model]

    def show(self, summary: Mapping[str, Any] | None) -> Updates:
        """Offer the models of a report, if it has references that answers can reach."""
        if not summary or summary["form"] != "answers" or not summary["references"]:
            return {self.part: gr.update(visible=False), self.model: gr.update(choices=[], value=None)}
        choices = [(model["title"], model["id"]) for model in summary["voices"]]
        return {
            self.part: gr.update(visible=True),
            self.model: gr.update(choices=choices, value=choices[0][1]),
        }

    def save_answers(self, id: str, model: str | None, comparison: str | None) -> Updates:
        try:
            run = runs.get(self.saves, id)
            with acting(self.saves, "derive", f"right answers of {run.id}"):
                saved = save_right_answers(run.dir, model or "", self.data, comparison or "")
                owners.claim_sets(self.data, [saved.dataset], asking().name)
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}
        counts = {"rows": saved.rows, "answers": saved.answers, "thinking": saved.with_reasoning}
        return {self.message: notices.toast(self.words("right-answers-saved", name=saved.dataset, **counts))}
