"""The form as an EvaluationSpec, and the button that starts the evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal, problem
from engine.evaluation import evaluation_memory
from engine.evaluation.evaluation_spec import EvaluationSpec, frozen
from engine.launch.workspace import is_inside
from engine.runs import runs
from webui import boxes, notices
from webui.evaluate_tab.judge_panel import JudgePanel
from webui.evaluate_tab.models_panel import ModelsPanel
from webui.evaluate_tab.panel import Context, Panel, Values
from webui.evaluate_tab.questions_panel import QuestionsPanel
from webui.evaluate_tab.report_panel import ReportPanel
from webui.evaluate_tab.sampling_panel import SamplingPanel
from webui.evaluate_tab.tasks_panel import TasksPanel
from webui.events import QUIET
from webui.panels import Updates
from webui.people import acting

# The label of each setting in page.yaml, for problems. Limits are declared in EvaluationSpec.
SETTING_LABELS = {
    "name": "evaluate-name",
    "data.max_samples": "evaluate-rows",
    "data.seed": "evaluate-seed",
    "generation.max_new_tokens": "evaluate-longest",
    "generation.temperature": "evaluate-temperature",
    "generation.samples": "evaluate-samples",
    "generation.top_p": "evaluate-top-p",
    "generation.seed": "evaluate-seed",
    "generation.batch_size": "evaluate-batch",
    "harness.num_fewshot": "evaluate-shots",
    "harness.limit": "evaluate-limit",
    "judge.model": "evaluate-judge",
    "judge.criterion": "evaluate-criterion",
    "judge.max_input_tokens": "evaluate-judge-input",
    "judge.max_reason_tokens": "evaluate-judge-longest",
    "judge.quantization": "evaluate-judge-quantization",
    "judge.ratings": "evaluate-ratings",
}


class FormPanel(Panel):
    """The controls are in the panels `measured`, `questions`, `tasks`, `judge` and `sampling`."""

    def __init__(
        self,
        context: Context,
        measured: ModelsPanel,
        questions: QuestionsPanel,
        tasks: TasksPanel,
        judge: JudgePanel,
        sampling: SamplingPanel,
        report: ReportPanel,
    ):
        super().__init__(context)
        self.measured, self.questions, self.tasks = measured, questions, tasks
        self.judge, self.sampling, self.report = judge, sampling, report

    def layout(self) -> None:
        label = self.words("evaluate-start")
        self.start_button = gr.Button(label, variant="primary", elem_id="evaluate-start", elem_classes="acts")
        self.problems = gr.HTML(elem_id="evaluate-wrong")

    def wire(self) -> None:
        report = self.report
        inputs = {*self.inputs, report.rows.order, report.rows.text}
        outputs = [self.message, self.opened, self.problems, report.listing.html, *report.outputs]
        self.start_button.click(self.start, inputs, outputs, **QUIET)
        self.judge.check.click(self.check_judge, inputs, outputs, **QUIET)

    @property
    def inputs(self) -> list[Block]:
        """Every control of the form."""
        parts = (self.measured, self.questions, self.tasks, self.judge, self.sampling)
        return [control for part in parts for control in part.inputs]

    def read(self, values: Values) -> EvaluationSpec:
        """The spec that the controls describe. Raises Refusal."""
        return EvaluationSpec.read(
            {
                "name": self.sampling.read_name(values),
                **self.measured.read(values),
                "data": self.questions.read_data(values) | self.sampling.read_data(values),
                "generation": self.questions.read_generation(values) | self.sampling.read_generation(values),
                "harness": self.tasks.read(values),
                "judge": self.judge.read(values),
            }
        )

    @property
    def filled(self) -> list[Block]:
        """What `fill` sets."""
        return [*self.inputs, self.problems]

    def fill(self, spec: EvaluationSpec) -> Updates:
        """Set the form to a spec, and say what of it does not exist here."""
        spec = frozen(spec, self.workplace)
        updates: Updates = {}
        for part in (self.measured, self.questions, self.tasks, self.judge, self.sampling):
            updates |= part.fill(spec)
        missing = self._missing(spec, updates)
        notes = [problem("evaluate-missing", names=", ".join(missing))] if missing else []
        return updates | {self.problems: notices.noted(notes, self.words)}

    def _missing(self, spec: EvaluationSpec, updates: Updates) -> list[str]:
        """What a spec chooses and a list does not offer: a result or a model in the runs' folder by its path there."""
        chosen = {
            self.measured.results: spec.results,
            self.questions.datasets: spec.data.datasets,
            self.tasks.tasks: spec.harness.tasks,
            self.judge.ratings: spec.judge.ratings,
        }
        missing = [name for control, names in chosen.items() for name in names if name not in updates[control]["value"]]
        if spec.judge.model != updates[self.judge.model]["value"]:
            missing.append(spec.judge.model)
        return [self._place(name) for name in missing]

    def _place(self, name: str) -> str:
        inside = os.path.isabs(name) and is_inside(Path(name), (self.saves,))
        return os.path.relpath(name, self.saves) if inside else name

    def start(self, values: Values, request: gr.Request) -> Updates:
        return self._start(self.read, values, request)

    def check_judge(self, values: Values, request: gr.Request) -> Updates:
        """Start an evaluation that only compares the judge with a person's ratings."""
        return self._start(lambda held: EvaluationSpec.read(self.judge.read_check(held)), values, request)

    def _start(self, read: Callable[[Values], EvaluationSpec], values: Values, request: gr.Request) -> Updates:
        try:
            spec = read(values)
            with acting(self.workplace.saves, "start", f"evaluation {spec.name}".strip()):
                run = runs.submit(spec, self.workplace, by=self.context.user(request))
        except Refusal as refusal:
            problems = boxes.with_labels(refusal.problems, SETTING_LABELS, self.words)
            return {self.problems: notices.listed(problems, self.words)}
        rows, message = self.report.rows, notices.toast(self.words("started"))
        return {
            self.message: message,
            self.opened: run.id,
            self.problems: notices.noted(evaluation_memory.doubts(frozen(spec, self.workplace), []), self.words),
            **self.report.listing.show(run.id),
            **self.report.open(run.id, values[rows.order], values[rows.text], "1"),
        }
