"""Filling in the form from a preset, and choosing other data sets for a stage that does not suit the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.runs.plan import first_preset, refitted, start_from
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.events import QUIET
from webui.form.settings import DATASETS
from webui.panels import Updates
from webui.train_tab.panel import Context, Panel
from webui.train_tab.settings_panel import SettingsPanel
from webui.train_tab.summary_panel import SummaryPanel

DATASET_CONTROLS = (DATASETS, f"{DATASETS}:weights")  # of the chosen data sets


class PresetPanel(Panel):
    def __init__(self, context: Context, settings: SettingsPanel, summary: SummaryPanel):
        super().__init__(context)
        self.settings, self.summary = settings, summary

    def wire(self) -> None:
        controls = self.settings.form.controls
        datasets = [controls[path] for path in DATASET_CONTROLS]
        stage: Any = controls["stage"]
        stage.input(self.refit_datasets, self.settings.inputs, [self.message, *datasets], **QUIET)
        preset: Any = self.settings.preset
        preset.input(self.choose_preset, preset, [self.message, *self.summary.filled], **QUIET)

    @property
    def begins(self) -> list[Block]:
        """The outputs of `begin`."""
        return [self.message, self.settings.preset, *self.summary.filled]

    def begin(self) -> Updates:
        """The form of a page that has just been opened."""
        name = first_preset(self.workplace)
        return {self.settings.preset: name} | self._fill(name, self.settings.form.first)

    def choose_preset(self, name: str) -> Updates:
        known = name in self.workplace.presets()
        return self._fill(name, self.settings.form.updates) if known else gr.skip()

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
