"""The Evaluate tab: what is measured on which rows, and what has been found.

    models_panel     which models are measured         list_panel    all evaluations
    questions_panel  on which data sets                report_panel  the open one, and what it has found
    tasks_panel      tasks of lm-evaluation-harness    rows_panel    its rows, with all answers
    sampling_panel   how answers are drawn             form_panel    the form as a spec, and its start

An evaluation is a run like others, with a state in its folder; so nothing is kept here but which one is open.
`evaluation_models` holds no components: it says what can be measured.
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
from webui.evaluate_tab.list_panel import ListPanel
from webui.evaluate_tab.models_panel import ModelsPanel
from webui.evaluate_tab.panel import Context
from webui.evaluate_tab.questions_panel import QuestionsPanel
from webui.evaluate_tab.report_panel import ReportPanel
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
    arrive: Callable[..., Updates]  # the tab as it is now, answered into `outputs`
    inputs: list[Block]  # what `arrive` is given: `opened`, the base and the results come first
    outputs: list[Block]
    pick: Callable[[Run], tuple[str, list[str]]]  # the base and the results to evaluate a run; raises Refusal
    form: list[Block]  # every control of the form
    fill: Callable[[EvaluationSpec], Updates]  # answers a spec into `form`


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    message: gr.HTML,
    user: Callable[[gr.Request], str],
    bases: Callable[[], list[tuple[str, str]]],
    progress_of: Callable[[Run], tuple[str, str, str]],
) -> EvaluateTab:
    """The tab in the current context. `bases` lists what can be a base, as (label, folder); `progress_of` tells the
    progress, the state and the failure of a run as HTML."""
    models = EvaluationModels(words, workplace, bases)
    context = Context(words, workplace, root, message, user, progress_of, models, opened=hidden_value())
    listing, rows = ListPanel(context), RowsPanel(context)
    report = ReportPanel(context, listing, rows)
    questions, tasks, sampling = QuestionsPanel(context), TasksPanel(context), SamplingPanel(context)
    measured = ModelsPanel(context, questions)
    form = FormPanel(context, measured, questions, tasks, sampling, report)

    with gr.Row(elem_classes="split data evaluate", equal_height=False):
        with (
            gr.Column(scale=4, min_width=300, elem_classes="shelf"),
            gr.Column(elem_classes="card evaluate-card"),
        ):
            for panel in (measured, questions, tasks, sampling, form):
                panel.layout()
        with gr.Column(scale=9, min_width=420, elem_classes="one-set"):
            for panel in (listing, report, rows):
                panel.layout()

    for panel in (measured, form, report, rows):
        panel.wire()
    questions.wire(measured.base, measured.results)

    view = TabView(context, measured, tasks, report)
    return EvaluateTab(
        context.opened, report.timer, view.arrive, view.inputs, view.outputs, models.of_run, form.inputs, form.fill
    )  # fmt: skip
