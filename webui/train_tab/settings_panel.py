"""The form: a control for every setting, and the choices of those that list models, data sets and results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Problem, Refusal
from engine.models.trainable_modules import ALL_LINEAR, fully_trainable_modules, linear_modules
from engine.runs import own_presets
from engine.runs.own_presets import OwnPreset
from engine.runs.plan import start_from
from engine.runs.results import results
from engine.spec.run_spec import RunSpec, fields
from webui.events import LATEST
from webui.form import reading
from webui.form.controls import Form
from webui.form.settings import (
    DATASET_NAMES,
    MODEL,
    RESULT_SETTINGS,
    RUN_NAME,
    SAVED_MODULES,
    TARGET_MODULES,
    essential,
    part_id,
    part_of,
    paths,
)
from webui.panels import Updates
from webui.people import asking
from webui.train_tab.choices import dataset_choices, local_model, result_choices, trainable_models
from webui.train_tab.conversion_panel import ConversionPanel
from webui.train_tab.model_html import QUANTIZATION
from webui.train_tab.panel import Context, Panel

OWN = "own:"  # begins the value of a preset that a user has saved
SETTINGS_WITH_LISTS = (MODEL, *DATASET_NAMES, *RESULT_SETTINGS)  # choices: what is on disk


class SettingsPanel(Panel):
    """`preset` is the preset with which the page is built."""

    def __init__(self, context: Context, preset: str):
        super().__init__(context)
        self.first_preset = preset
        self.form = Form(context.words, start_from(context.workplace, preset)[0])
        self.conversion = ConversionPanel(context)

    def layout(self) -> None:
        self._layout_of_essentials()
        self._layout_of_others()

    def layout_of_preset(self) -> None:
        """What the form has been filled in from."""
        self.preset = gr.Dropdown(
            self.preset_choices(()),
            label=self.words("preset"),
            info=self.words("preset-help"),
            value=self.first_preset,
            elem_id="preset",
            elem_classes="field",
            interactive=True,
            # A restarted studio does not know which presets of users it has offered to this page.
            allow_custom_value=True,
        )

    def preset_choices(self, own: Iterable[OwnPreset]) -> list[tuple[str, str]]:
        """Titles and values: those of users, then those that come with Athanor."""
        words, name = self.words, asking().name
        labels = [
            (
                words("preset-mine", name=preset.name) if preset.by == name else f"{preset.name} · {preset.by or '—'}",
                f"{OWN}{preset.id}",
            )
            for preset in own
        ]
        return labels + [(about["title"][words.language], name) for name, about in self.workplace.presets().items()]

    def layout_of_name(self) -> None:
        self.form.place(RUN_NAME)

    def _layout_of_essentials(self) -> None:
        """The directly visible settings, one section for each part; facts about the model are shown under its field,
        and problems with the quantization package under that."""
        in_view = [path for path in fields() if essential(path)]
        lines: dict[str, gr.HTML] = {}
        for part in parts_of(in_view):
            with gr.Column(elem_classes="section"):
                gr.HTML(f"<h2>{escape(self.words.part(part))}</h2>")
                with gr.Column(elem_classes="grid grid-4"):
                    for path in (path for path in in_view if part_of(path) == part):
                        self.form.place(path)
                        if path in (MODEL, QUANTIZATION):
                            lines[path] = gr.HTML(elem_classes="facts")
                        if path == MODEL:
                            self.conversion.layout()
        self.model_facts, self.packages = lines[MODEL], lines[QUANTIZATION]

    def _layout_of_others(self) -> None:
        """Everything else, one collapsed group for each part."""
        others = [path for path in paths() if path not in self.form.controls and path != RUN_NAME]
        gr.HTML(f"<h2>{escape(self.words('section-other'))}</h2>", elem_classes="section-title")
        with gr.Column(elem_classes="folds"):
            for part in parts_of(others):
                with (
                    gr.Accordion(self.words.part(part), open=False, elem_id=part_id(part), elem_classes="fold"),
                    gr.Column(elem_classes="grid grid-3"),
                ):
                    for path in (path for path in others if part_of(path) == part):
                        self.form.place(path)

    def wire(self) -> None:
        """To be wired before `SummaryPanel`, which reads the form at the same event: the page makes the calls of an
        event one after another, and an overtaken call of that handler never ends."""
        model: Any = self.form.controls[MODEL]
        named = [self.form.controls[path] for path in (TARGET_MODULES, SAVED_MODULES)]
        model.change(self.list_modules, model, named, **LATEST)
        self.conversion.wire(model)

    @property
    def inputs(self) -> list[Block]:
        return self.form.inputs

    @property
    def lists(self) -> list[Block]:
        """The controls that list models, data sets and results."""
        return [self.form.controls[path] for path in SETTINGS_WITH_LISTS]

    def start(self, preset: Any) -> RunSpec | None:
        """The spec that a preset fills in; None for an unknown one. That of a user is applied to the defaults."""
        name = str(preset)
        if name in self.workplace.presets():
            return start_from(self.workplace, name)[0]
        try:
            own = own_presets.get(self.workplace.saves, name.removeprefix(OWN), asking())
        except Refusal:
            return None
        return own_presets.applied(own, RunSpec().change("data.dataset_dir", str(self.workplace.data))).spec

    def read(self, held: Sequence[Any]) -> tuple[RunSpec, list[Problem]]:
        """The values of the controls as a spec, and what could not be parsed and was replaced by a default."""
        return reading.read(self.form.values(held))

    def list_choices(self) -> Updates:
        """The models, data sets and results that exist now."""
        finished = results(self.workplace.saves)
        choices = {path: result_choices(finished, path, self.words) for path in RESULT_SETTINGS}
        choices |= dict.fromkeys(DATASET_NAMES, dataset_choices(self.workplace, self.words))
        choices[MODEL] = trainable_models(self.workplace, self.words)
        return {self.form.controls[path]: gr.update(choices=choices[path]) for path in SETTINGS_WITH_LISTS}

    def list_modules(self, name_or_path: str) -> Updates:
        """The modules of the chosen model: those that LoRA can target, and those that can be trained in full."""
        model = local_model(name_or_path, self.workplace)
        targets = [ALL_LINEAR, *(linear_modules(model) if model else ())]
        saved = fully_trainable_modules(model) if model else []
        return {
            self.form.controls[TARGET_MODULES]: gr.update(choices=targets),
            self.form.controls[SAVED_MODULES]: gr.update(choices=saved),
        }


def parts_of(settings: Sequence[str]) -> list[str]:
    """The parts of the spec with these settings, in their order."""
    return [part for part in RunSpec.model_fields if any(part_of(path) == part for path in settings)]
