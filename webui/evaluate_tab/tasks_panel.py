"""The tasks of lm-evaluation-harness, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.evaluation import harness
from engine.evaluation.evaluation_spec import EvaluationSpec
from webui import boxes, reports
from webui.evaluate_tab.panel import Panel, Values
from webui.panels import Updates


class TasksPanel(Panel):
    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("tasks"), open=False, elem_classes="fold", elem_id="tasks-fold"):
            self.tasks = gr.Dropdown(
                [],
                value=[],
                label=words("evaluate-tasks"),
                info=words("evaluate-tasks-help"),
                multiselect=True,
                elem_id="evaluate-tasks",
                elem_classes="field",
                interactive=True,
            )
            self.unusable = gr.HTML(elem_id="evaluate-unfit")
            with gr.Column(elem_classes="grid grid-2"):
                self.shots = self.number("shots", "", info=words("evaluate-shots-help"))
                self.limit = self.number("limit", "", info=words("evaluate-limit-help"))
            self.chat_template = gr.Checkbox(
                True,
                label=words("evaluate-templated"),
                info=words("evaluate-templated-help"),
                elem_id="evaluate-templated",
            )

    @property
    def inputs(self) -> list[Block]:
        return [self.tasks, self.shots, self.limit, self.chat_template]

    def show(self, names: Sequence[str] | None) -> Updates:
        """Offer the tasks that can be run, and say why others cannot; of the
        selected ones, `names`, those that can are kept."""
        known = harness.tasks(self.data)
        usable = [task.name for task in known if not task.problem]
        chosen = [name for name in names or () if name in usable]
        folder = self.data / harness.TASKS_FOLDER
        return {
            self.tasks: gr.update(choices=usable, value=chosen),
            self.unusable: reports.task_notes(known, folder, harness.installed(), self.words),
        }

    # ---- part of the spec

    def read(self, values: Values) -> dict[str, Any]:
        numbers = {"num_fewshot": values[self.shots], "limit": values[self.limit]}
        return boxes.typed_values(numbers) | {
            "tasks": list(values[self.tasks] or ()),
            "apply_chat_template": bool(values[self.chat_template]),
        }

    def fill(self, spec: EvaluationSpec) -> Updates:
        settings = spec.harness
        return {
            self.tasks: self.show(settings.tasks)[self.tasks],
            self.shots: "" if settings.num_fewshot is None else str(settings.num_fewshot),
            self.limit: "" if settings.limit is None else str(settings.limit),
            self.chat_template: settings.apply_chat_template,
        }
