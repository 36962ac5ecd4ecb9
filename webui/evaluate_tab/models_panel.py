"""The models to evaluate: a base, and results that were trained from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.trained_results import model_part_of_base, trained_result
from webui.evaluate_tab.panel import Context, Panel, Values
from webui.evaluate_tab.questions_panel import QuestionsPanel
from webui.events import LATEST
from webui.panels import Updates
from webui.pickers import picker

MAX_RESULTS_MEASURED = 6  # together


class ModelsPanel(Panel):
    """The panel `questions` depends on the models: reward models need other data sets."""

    def __init__(self, context: Context, questions: QuestionsPanel):
        super().__init__(context)
        self.questions = questions

    def layout(self) -> None:
        words = self.words
        self.base = gr.Dropdown(
            [],
            value=None,
            label=words("chat-base"),
            allow_custom_value=True,
            elem_id="evaluate-base",
            elem_classes="field",
            interactive=True,
        )
        self.results = gr.Dropdown(
            [],
            value=[],
            label=words("evaluate-results"),
            info=words("evaluate-results-help"),
            multiselect=True,
            max_choices=MAX_RESULTS_MEASURED,
            elem_id="evaluate-results",
            elem_classes="field",
            interactive=True,
        )
        self.with_base = gr.Checkbox(True, label=words("evaluate-with-base"), elem_id="evaluate-with-base")

    def wire(self) -> None:
        chosen = [self.base, self.results, self.questions.datasets]
        dependent = [self.results, self.with_base, self.questions.datasets]
        self.base.input(self.show_results, chosen, dependent, **LATEST)
        self.results.input(self.choose_results, chosen, [self.base, *dependent], **LATEST)

    @property
    def inputs(self) -> list[Block]:
        return [self.base, self.results, self.with_base]

    # ---- choices

    def show(self, base: str | None, folders: Sequence[str] | None, names: Sequence[str] | None) -> Updates:
        """Update all lists."""
        bases = gr.update(choices=self.models.bases(), value=base)
        return {self.base: bases} | self.show_results(base, folders, names)

    def show_results(self, base: str | None, folders: Sequence[str] | None, names: Sequence[str] | None) -> Updates:
        """Update the lists of results and of data sets; of the selected ones,
        `folders` and `names`, those that still fit are kept."""
        chosen = [str(result.folder) for result in self.models.selected_results(base, folders)]
        reward_models = self.models.only_reward_models(base, folders)
        return {
            self.results: picker(
                self.models.result_choices(base), chosen, self.words("evaluate-results-help"), self.words
            ),
            self.with_base: gr.update(visible=not reward_models),
            **self.questions.fitting(base, folders, names),
        }

    def choose_results(self, base: str | None, folders: Sequence[str] | None, names: Sequence[str] | None) -> Updates:
        """Switch to the base of the result that was selected last."""
        base = self.models.base_of_last(base, folders)
        return {self.base: base} | self.show_results(base, folders, names)

    # ---- part of the spec

    def read(self, values: Values) -> dict[str, Any]:
        """The models as parts of the spec. The base is loaded with the settings
        of the run that made the first result."""
        folders = list(values[self.results] or ())
        result = trained_result(folders[0]) if folders else None
        model = model_part_of_base(result).model_dump() if result else {}
        return {
            "model": model | {"model_name_or_path": values[self.base] or ""},
            "with_base": bool(values[self.with_base]),
            "results": folders,
        }

    def fill(self, spec: EvaluationSpec) -> Updates:
        """Set the controls to a spec. Results that do not exist here are left
        out; if none is left, the base is evaluated."""
        shown = self.show(spec.model.model_name_or_path, spec.results, spec.data.datasets)
        with_base = spec.with_base or not shown[self.results]["value"]
        return shown | {self.with_base: gr.update(value=with_base)}
