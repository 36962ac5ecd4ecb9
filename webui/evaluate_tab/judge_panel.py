"""The judge: which model scores the answers, what it is asked, and the ratings with which it is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal, problem
from engine.data.datasets import read_dataset_info
from engine.evaluation.evaluation_settings import Judge
from engine.evaluation.evaluation_spec import RATINGS_FIELD, EvaluationSpec, rated_datasets
from engine.evaluation.judge import texts
from webui import boxes
from webui.evaluate_tab.panel import Panel, Values
from webui.events import QUIET
from webui.panels import Updates

QUANTIZATIONS = ("none", "8bit", "4bit")
LANGUAGES = [("English", "en"), ("中文", "zh")]


class JudgePanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("evaluate-judge"), open=False, elem_classes="fold", elem_id="judge-fold"):
            self.model = gr.Dropdown(
                [self._without],
                value="",
                label=words("evaluate-judge"),
                info=words("evaluate-judge-help"),
                elem_id="evaluate-judge",
                elem_classes="field",
                interactive=True,
            )
            self.criterion = gr.Textbox(
                label=words("evaluate-criterion"),
                info=words("evaluate-criterion-help"),
                placeholder=texts(words.language)["criterion"],
                lines=3,
                elem_id="evaluate-criterion",
                elem_classes="field",
                interactive=True,
            )
            self.reason = self._box("judge-reason")
            self.compare = self._box("judge-compare")
            with gr.Column(elem_classes="grid grid-2"):
                self.language = self._choice("judge-language", words.language, LANGUAGES)
                names = [(words(f"evaluate-judge-{name}"), name) for name in QUANTIZATIONS]
                self.quantization = self._choice("judge-quantization", "none", names)
            with gr.Column(elem_classes="grid grid-2"):
                self.max_input = self.number("judge-input", "3072", info=words("evaluate-judge-input-help"))
                self.max_reason = self.number("judge-longest", "96", info=words("evaluate-longest-help"))
            self.ratings = gr.Dropdown(
                [],
                value=[],
                label=words("evaluate-ratings"),
                info=words("evaluate-ratings-help"),
                multiselect=True,
                elem_id="evaluate-ratings",
                elem_classes="field",
                interactive=True,
            )
            self.check = gr.Button(
                words("evaluate-judge-check"), size="sm", elem_id="evaluate-judge-check", elem_classes="acts"
            )

    @property
    def _without(self) -> tuple[str, str]:
        return self.words("evaluate-judge-without"), ""

    def _box(self, name: str) -> gr.Checkbox:
        code = f"evaluate-{name}"
        return gr.Checkbox(True, label=self.words(code), info=self.words(f"{code}-help"), elem_id=code)

    def _choice(self, name: str, value: str, choices: list[tuple[str, str]]) -> gr.Dropdown:
        code = f"evaluate-{name}"
        label = self.words(code)
        return gr.Dropdown(
            choices, value=value, label=label, elem_id=code, elem_classes="field", interactive=True, min_width=120
        )

    def wire(self) -> None:
        self.language.change(
            lambda language: gr.update(placeholder=texts(language)["criterion"]), self.language, self.criterion, **QUIET
        )

    @property
    def inputs(self) -> list[Block]:
        prompting = [self.criterion, self.reason, self.compare, self.language, self.max_input, self.max_reason]
        return [self.model, self.quantization, *prompting, self.ratings]

    @property
    def lists(self) -> list[Block]:
        """The controls whose choices are refreshed."""
        return [self.model, self.ratings]

    def show(self, model: str | None, ratings: Sequence[str] | None) -> Updates:
        """Offer every model and every data set with ratings; what is chosen is kept if it is still there."""
        known = [self._without, *self.models.judges()]
        model = model if model in [folder for _, folder in known] else ""
        rated = rated_datasets(read_dataset_info(self.data)[0])
        return {
            self.model: gr.update(choices=known, value=model),
            self.ratings: gr.update(choices=rated, value=[name for name in ratings or () if name in rated]),
        }

    # ---- part of the spec

    def read(self, values: Values) -> dict[str, Any]:
        """The judge as a part of the spec; without a model, nothing of it applies."""
        ratings = list(values[self.ratings] or ())
        if not values[self.model]:
            return {"ratings": ratings}
        lengths = {"max_input_tokens": values[self.max_input], "max_reason_tokens": values[self.max_reason]}
        return boxes.typed_values(lengths) | {
            "model": values[self.model],
            "language": values[self.language],
            "criterion": (values[self.criterion] or "").strip(),
            "reason": bool(values[self.reason]),
            "compare": bool(values[self.compare]),
            "quantization": values[self.quantization],
            "ratings": ratings,
        }

    def read_check(self, values: Values) -> dict[str, Any]:
        """A spec that only compares the judge with ratings: the chosen ones, otherwise all. Raises Refusal if nothing
        has been rated yet."""
        judge = self.read(values)
        judge["ratings"] = judge["ratings"] or rated_datasets(read_dataset_info(self.data)[0])
        if not judge["ratings"]:
            raise Refusal(problem("judge-nothing-rated", RATINGS_FIELD))
        return {"judge": judge}

    def fill(self, spec: EvaluationSpec) -> Updates:
        """Set the controls to a spec. A judge that does not exist here is left out."""
        judge = spec.judge if spec.judge.model else Judge.read({"language": self.words.language})
        return {
            **self.show(judge.model, spec.judge.ratings),
            self.criterion: judge.criterion,
            self.reason: judge.reason,
            self.compare: judge.compare,
            self.language: judge.language,
            self.quantization: judge.quantization,
            self.max_input: str(judge.max_input_tokens),
            self.max_reason: str(judge.max_reason_tokens),
        }
