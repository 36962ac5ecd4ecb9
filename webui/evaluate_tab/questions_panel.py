"""The questions: data sets, number of rows, and maximum length of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.data import owners, uploads
from engine.data.datasets import read_dataset_info
from engine.data.row_files import truncation_problem
from engine.evaluation.evaluation_spec import EvaluationSpec, add_questions, fitting_datasets
from webui import boxes, notices
from webui.evaluate_tab.panel import Panel, Values
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking


class QuestionsPanel(Panel):
    def layout(self) -> None:
        words = self.words
        self.datasets = gr.Dropdown(
            [],
            value=[],
            label=words("evaluate-data"),
            info=words("evaluate-data-help"),
            multiselect=True,
            elem_id="evaluate-data",
            elem_classes="field",
            interactive=True,
        )
        self.upload = gr.UploadButton(
            words("evaluate-upload"),
            type="filepath",
            size="sm",
            elem_id="evaluate-upload",
            file_types=None,
            elem_classes="acts",
        )
        with gr.Column(elem_classes="grid grid-2"):
            self.rows = self.number("rows", "200", info=words("evaluate-rows-help"))
            self.max_tokens = self.number("longest", "256", info=words("evaluate-longest-help"))
        label, help = words("evaluate-thinking"), words("evaluate-thinking-help")
        self.thinking = gr.Checkbox(True, label=label, info=help, elem_id="evaluate-thinking")
        self.without_references = gr.Checkbox(
            False, label=words("evaluate-alone"), info=words("evaluate-alone-help"), elem_id="evaluate-alone"
        )

    def wire(self, base: gr.Dropdown, results: gr.Dropdown) -> None:
        """`base` and `results` are the controls for the models."""
        inputs = [self.upload, self.datasets, base, results]
        self.upload.upload(self.receive, inputs, [self.message, self.datasets], **QUIET)

    @property
    def inputs(self) -> list[Block]:
        return [self.datasets, self.rows, self.max_tokens, self.thinking, self.without_references]

    def fitting(self, base: str | None, folders: Sequence[str] | None, names: Sequence[str] | None) -> Updates:
        """Offer the data sets that suit the selected models; of the selected
        ones, `names`, those that suit are kept."""
        form = "pairs" if self.models.only_reward_models(base, folders) else "answers"
        known = fitting_datasets(read_dataset_info(self.data)[0], form)
        return {self.datasets: gr.update(choices=known, value=[name for name in names or () if name in known])}

    @refusal_as_message
    def receive(
        self, path: str, names: Sequence[str] | None, base: str | None, folders: Sequence[str] | None
    ) -> Updates:
        """Make a data set of an uploaded file of questions, and select it."""
        with acting(self.workplace.saves, "upload", Path(path or "").name):
            file = uploads.receive(Path(path), Path(path).name, self.data)
            Path(path).unlink(missing_ok=True)
            name, truncated = add_questions(self.data, file), truncation_problem(file)
            owners.claim_sets(self.data, [name], asking().name)
        message = notices.toast(self.words("evaluate-uploaded", name=name))
        if truncated:
            message = notices.refused([truncated], self.words)
        return {self.message: message} | self.fitting(base, folders, [*(names or ()), name])

    # ---- part of the spec

    def read_data(self, values: Values) -> dict[str, Any]:
        rows = boxes.typed_values({"max_samples": values[self.rows]})
        return {
            "datasets": list(values[self.datasets] or ()),
            "without_references": bool(values[self.without_references]),
            **({"max_samples": None} if rows.get("max_samples") == "0" else rows),
        }

    def read_generation(self, values: Values) -> dict[str, Any]:
        return boxes.typed_values({"max_new_tokens": values[self.max_tokens]}) | {
            "thinking": bool(values[self.thinking])
        }

    def fill(self, spec: EvaluationSpec) -> Updates:
        """Set the controls to a spec, except the data sets, which depend on the models."""
        return {
            self.rows: f"{spec.data.max_samples or 0:g}",
            self.max_tokens: f"{spec.generation.max_new_tokens:g}",
            self.thinking: spec.generation.thinking,
            self.without_references: spec.data.without_references,
        }
