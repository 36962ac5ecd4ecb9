"""The form of an export, with a preview of the export and the button that starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.export import export_spec
from engine.export.export_spec import ExportSpec
from engine.runs import runs
from engine.runs.results import Result, results, titles
from webui import notices
from webui.events import QUIET, on_settled, settled_trigger
from webui.export_tab import controls, plan_html
from webui.export_tab.export_list import ExportList
from webui.export_tab.export_specs import export_spec_of
from webui.export_tab.panel import Context, Panel
from webui.panels import Updates
from webui.people import acting
from webui.pickers import picker
from webui.words import Words

COMBINATION_SETTINGS = ("weights", "combination", "density", "svd_rank")  # only if adapters are combined


class FormPanel(Panel):
    """`controls` are those of the form by name, the chosen runs first."""

    controls: dict[str, Block]

    def __init__(self, context: Context, exports: ExportList):
        super().__init__(context)
        self.exports = exports

    def layout(self) -> None:
        words = self.words
        with gr.Column(scale=7, min_width=420, elem_classes="sheet export-form"):
            with gr.Column(elem_classes="section grid grid-3"):
                essential = self._essential_controls()
            with (
                gr.Column(elem_classes="folds"),
                gr.Accordion(words("section-other"), open=False, elem_classes="fold", elem_id="export-more"),
                gr.Column(elem_classes="grid grid-3"),
            ):
                others = self._other_controls()
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
            name = controls.text("name", words)
            self.plan = gr.HTML(elem_id="export-card")
            self.settled = settled_trigger("export-settled")
            self.start_button = gr.Button(
                words("export-start"), variant="primary", size="lg", elem_id="export-start", elem_classes="acts"
            )
        self.controls = essential | others | {"name": name}

    def _essential_controls(self) -> dict[str, Block]:
        words = self.words
        return {
            "runs": gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                label=words("export-runs"),
                info=words("export-runs-help"),
                elem_id="export-runs",
                elem_classes="field",
                interactive=True,
            ),
            "weights": gr.Textbox(
                label=words("export-weights"),
                info=words("export-weights-help"),
                max_lines=1,
                visible=False,
                elem_id="export-weights",
                elem_classes="field",
            ),
            "combination": controls.choice("combination", words, visible=False),
            "form": gr.Radio(
                controls.choices("form", words),
                value="merged",
                label=words.of_export("form", "label"),
                info=words.of_export("form", "help"),
                elem_id="export-form",
                elem_classes="field field-union",
            ),
            **{name: controls.choice(name, words) for name in ("precision", "quantize", "gguf")},
        }

    def _other_controls(self) -> dict[str, Block]:
        words = self.words
        devices = [(words.choice("hardware.device", kind), kind) for kind in ("auto", "cuda", "cpu")]
        return {
            "shard_gb": controls.text("shard_gb", words),
            "license": controls.text("license", words),
            "device": gr.Dropdown(
                devices,
                value="auto",
                label=words.label("hardware.device"),
                info=words.help("hardware.device"),
                elem_id="export-device",
                elem_classes="field field-choice",
            ),
            "check_prompts": controls.text("check_prompts", words),
            "density": controls.text("density", words, visible=False),
            "svd_rank": controls.text("svd_rank", words, visible=False),
            "prompts": controls.text("prompts", words, lines=3, help=words("export-prompts-help")),
            "remark": controls.text("remark", words, lines=2),
        }

    def wire(self) -> None:
        on_settled(self.settled, self.look, self.inputs, self.changing)
        outputs = [self.message, *self.changing, *self.exports.outputs]
        self.start_button.click(self.start, self.inputs, outputs, **QUIET)

    @property
    def inputs(self) -> list[Block]:
        return list(self.controls.values())

    @property
    def changing(self) -> list[Block]:
        """The components that change with the values of the form."""
        return [self.plan, *(self.controls[name] for name in COMBINATION_SETTINGS)]

    @property
    def outputs(self) -> list[Block]:
        """The components that change when the tab is shown."""
        return [self.controls["runs"], *self.changing, *self.exports.outputs]

    @property
    def filled(self) -> list[Block]:
        """The outputs of `fill`."""
        names = ("runs", "form", "precision", "shard_gb", "device", "name")
        return [self.controls[name] for name in names]

    def arrive(self, chosen: Sequence[str] | None, *others: Any) -> Updates:
        """The exportable runs, with those of the chosen ones that still exist, and the exports."""
        labels = result_labels(results(self.saves), self.words)
        ids = [id for id in chosen or () if id in labels]
        return self._choosing(labels, ids) | self.look(ids, *others) | self.exports.listed()

    def fill(self, spec: ExportSpec) -> Updates | None:
        """Set the form to a spec; None if its adapters are not results of runs here, which this tab exports."""
        spec, finished = export_spec.frozen(spec, self.workplace), results(self.saves)
        ids = [result.run.id for result in finished if str(result.folder) in spec.adapters]
        if not ids or len(ids) < len(spec.adapters):
            return None
        return self._choosing(result_labels(finished, self.words), ids) | {
            self.controls["form"]: spec.form,
            self.controls["precision"]: spec.precision,
            self.controls["shard_gb"]: f"{spec.shard_gb:g}",
            self.controls["device"]: spec.hardware.device,
            self.controls["name"]: spec.name,
        }

    def look(self, *held: Any) -> Updates:
        """A preview of the export, and the settings that apply."""
        values = dict(zip(self.controls, held, strict=True))
        combined = gr.update(visible=len(values["runs"] or ()) > 1)
        settings = dict.fromkeys((self.controls[name] for name in COMBINATION_SETTINGS), combined)
        return {self.plan: self._plan(values)} | settings

    def start(self, request: gr.Request, *held: Any) -> Updates:
        try:
            spec = export_spec_of(dict(zip(self.controls, held, strict=True)), self.workplace)
            with acting(self.saves, "start", f"export {spec.name}".strip()):
                runs.submit(spec, self.workplace, by=self.user(request))
            message = notices.toast(self.words("started"))
        except Refusal as refusal:  # the summary lists them; the message only says that there are some
            message = notices.toast(notices.counted(refusal.problems, self.words), "bad")
        return {self.message: message} | self.look(*held) | self.exports.listed()

    def _choosing(self, labels: Mapping[str, str], ids: Sequence[str]) -> Updates:
        choices = [(label, id) for id, label in labels.items()]
        return {self.controls["runs"]: picker(choices, ids, self.words("export-runs-help"), self.words)}

    def _plan(self, values: Mapping[str, Any]) -> str:
        if not values["runs"]:
            return plan_html.plan(None, [], self.words)
        try:
            spec = export_spec.frozen(export_spec_of(values, self.workplace), self.workplace)
            return plan_html.plan(spec, export_spec.problems(spec, self.workplace, wait=False), self.words)
        except Refusal as refusal:
            return plan_html.plan(None, refusal.problems, self.words)


def result_labels(finished: Sequence[Result], words: Words) -> dict[str, str]:
    """The labels of results in the list of exportable runs, by the ids of their runs."""
    named = titles(finished)
    return {result.run.id: result_label(result, named[result.run.id], words) for result in finished}


def result_label(result: Result, title: str, words: Words) -> str:
    kind = words("export-kind-adapter" if result.adapter else "export-kind-model")
    return f"{title} · {words.choice('stage', result.stage)} · {kind} · {result.run.id.split('/')[0]}"
