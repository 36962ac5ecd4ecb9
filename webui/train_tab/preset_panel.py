"""Filling in the form from a preset, and choosing other data sets for a stage that does not suit the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core import kept_forms
from engine.runs.plan import first_preset, refitted, start_from
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.events import LATEST, on_chosen
from webui.form import kept, reading
from webui.form.kept import KeptForm
from webui.form.settings import DATASETS
from webui.form.writing import control_values
from webui.panels import Updates, refusal_as_message
from webui.people import asking
from webui.train_tab.own_presets_panel import OwnPresetsPanel
from webui.train_tab.panel import Context, Panel
from webui.train_tab.settings_panel import OWN, SettingsPanel
from webui.train_tab.summary_panel import SummaryPanel

DATASET_CONTROLS = (DATASETS, f"{DATASETS}:weights")  # of the chosen data sets


class PresetPanel(Panel):
    def __init__(self, context: Context, settings: SettingsPanel, summary: SummaryPanel, own: OwnPresetsPanel):
        super().__init__(context)
        self.settings, self.summary, self.own = settings, summary, own

    def wire(self) -> None:
        controls = self.settings.form.controls
        datasets = [controls[path] for path in DATASET_CONTROLS]
        stage: Any = controls["stage"]
        stage.input(self.refit_datasets, self.settings.inputs, [self.message, *datasets], **LATEST)
        inputs = [self.settings.preset, *self.settings.inputs]
        on_chosen(self.settings.preset, self.choose_preset, inputs, self.begins)

    @property
    def begins(self) -> list[Block]:
        """The outputs of `begin`."""
        return [self.message, *self.own.outputs, *self.summary.filled]

    def begin(self, in_browser: str = "") -> Updates:
        """The form of a page that has just been opened: as it was left or, at the first time, from a preset. Without a
        login, the browser knows how it was left."""
        name, form = asking().name, self.settings.form
        text = kept_forms.kept(self.workplace.saves, name) if name else in_browser
        if left := kept.read(text, form.built):
            return self._as_left(left)
        preset = first_preset(self.workplace)
        return self.own.first(preset) | self._fill(preset, lambda spec: form.first(control_values(spec)))

    def _as_left(self, left: KeptForm) -> Updates:
        start = self.settings.start(left.preset)
        # A setting that is newer than the form is as the preset has it.
        values = control_values(start or start_from(self.workplace, first_preset(self.workplace))[0]) | left.values
        spec, unreadable = reading.read(values)
        shown = self.summary.of_spec(spec, unreadable, start)
        return self.own.first(left.preset if start else None) | self.settings.form.first(values) | shown

    @refusal_as_message
    def choose_preset(self, name: Any, *held: Any) -> Updates:
        """The form as a preset has it; of a user's, only what it contains."""
        if (name := str(name)).startswith(OWN):
            return self.own.apply(name, held)
        known = name in self.workplace.presets()
        return self.own.listed(name) | self._fill(name, self.settings.form.updates) if known else gr.skip()

    def refit_datasets(self, *held: Any) -> Updates:
        """The data sets for a stage that has just been chosen."""
        spec, note = refitted(self.settings.read(held)[0], self.workplace)
        if not note:
            return gr.skip()
        updates = self.settings.form.updates(spec)
        controls = (self.settings.form.controls[path] for path in DATASET_CONTROLS)
        message = notices.toast(notices.sentence(note, self.words))
        return {self.message: message} | {control: updates[control] for control in controls}

    def _fill(self, name: str, values: Callable[[RunSpec], Updates]) -> Updates:
        """The form filled in from a preset, after a message about what could not be used of it."""
        spec, note = start_from(self.workplace, name)
        message = {self.message: notices.toast(notices.sentence(note, self.words))} if note else {}
        return message | values(spec) | self.summary.of_spec(spec, start=spec)
