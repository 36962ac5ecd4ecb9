"""The Evaluate tab: starting evaluations, and reading their reports.

    models_panel     the models to evaluate             list_panel    all evaluations
    questions_panel  data sets and rows                 report_panel  progress and findings of the open evaluation
    tasks_panel      tasks of lm-evaluation-harness     rows_panel    the rows with all answers
    judge_panel      a model that scores the answers    tab_view      opening the tab
    sampling_panel   name and sampling                  right_answers_panel  a data set of right answers
    form_panel       the form as a spec; starting it

An evaluation is a run like any other, so the state is in its folder; the page keeps only the id of the open one.
`evaluation_models` has no components: it lists the models that can be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from webui.evaluate_tab.evaluation_models import EvaluationModels
from webui.evaluate_tab.form_panel import FormPanel
from webui.evaluate_tab.judge_panel import JudgePanel
from webui.evaluate_tab.list_panel import ListPanel
from webui.evaluate_tab.models_panel import ModelsPanel
from webui.evaluate_tab.panel import Context
from webui.evaluate_tab.questions_panel import QuestionsPanel
from webui.evaluate_tab.report_panel import ReportPanel
from webui.evaluate_tab.right_answers_panel import RightAnswersPanel
from webui.evaluate_tab.rows_panel import RowsPanel
from webui.evaluate_tab.sampling_panel import SamplingPanel
from webui.evaluate_tab.tab_view import TabView
from webui.evaluate_tab.tasks_panel import TasksPanel
from webui.panels import Updates, hidden_value
from webui.words import Words


@dataclass(frozen=True)
class EvaluateTab:
    """The parts of the tab that the rest of the page is wired to."""

    opened: gr.Textbox  # the id of the open evaluation; "" = none
    timer: gr.Timer
    arrive: Callable[..., Updates]  # refreshes the tab: takes the id of the open run and the values of `inputs`
    inputs: list[Block]  # `opened`, the base, the results, and further controls
    outputs: list[Block]
    pick: Callable[[Run], tuple[str, list[str]]]  # base and results for a run; raises Refusal
    form: list[Block]  # every control of the form, and what is said about it
    fill: Callable[[EvaluationSpec], Updates]  # sets `form` to a spec


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    message: gr.HTML,
    user: Callable[[gr.Request], str],
    bases: Callable[[], list[tuple[str, str]]],
    progress_of: Callable[[Run], tuple[str, str, str]],
) -> EvaluateTab:
    """The tab in the current context. `bases` lists the possible bases as (label, folder); `progress_of` returns the
    progress, the state and the failure of a run as HTML."""
    models = EvaluationModels(words, workplace, bases)
    context = Context(words, workplace, root, message, user, progress_of, models, opened=hidden_value(by_reader=True))
    listing, rows, right_answers = ListPanel(context), RowsPanel(context), RightAnswersPanel(context)
    report = ReportPanel(context, listing, rows, right_answers)
    questions, tasks, sampling = QuestionsPanel(context), TasksPanel(context), SamplingPanel(context)
    judge = JudgePanel(context)
    measured = ModelsPanel(context, questions)
    form = FormPanel(context, measured, questions, tasks, judge, sampling, report)

    with gr.Row(elem_classes="split data evaluate", equal_height=False):
        with (
            gr.Column(scale=4, min_width=300, elem_classes="shelf"),
            gr.Column(elem_classes="card evaluate-card"),
        ):
            for part in (measured, questions, tasks, judge, sampling, form):
                part.layout()
        with gr.Column(scale=9, min_width=420, elem_classes="one-set"):
            for shown in (listing, report, right_answers, rows):
                shown.layout()

    for wired in (measured, judge, form, report, right_answers, rows):
        wired.wire()
    questions.wire(measured.base, measured.results)

    view = TabView(context, measured, tasks, judge, report)
    return EvaluateTab(
        context.opened, report.timer, view.arrive, view.inputs, view.outputs, models.of_run, form.filled, form.fill
    )
