"""The Train tab: a form for a RunSpec, a preview of what that spec would do, and the button that starts it.

    preset_panel     presets, which fill in the form   summary_panel    the preview, and the start
    settings_panel   a control for every setting       load_panel       settings from elsewhere
    search_panel     finds a setting by its words      own_presets_panel   presets of users

`choices` and the modules that write HTML have no components: they are functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.runs.plan import first_preset
from engine.spec.run_spec import RunSpec
from webui import gpus_html
from webui.gpus_panel import GpusPanel
from webui.panels import Updates
from webui.train_tab.load_panel import LoadPanel
from webui.train_tab.own_presets_panel import OwnPresetsPanel
from webui.train_tab.panel import Context
from webui.train_tab.preset_panel import PresetPanel
from webui.train_tab.search_panel import SearchPanel
from webui.train_tab.settings_panel import SettingsPanel
from webui.train_tab.summary_panel import SummaryPanel
from webui.train_tab.sweep_panel import SweepPanel
from webui.words import Words


@dataclass(frozen=True)
class TrainTab:
    """The parts of the tab that the rest of the page is wired to."""

    inputs: list[Block]  # every control of the form
    read: Callable[[Sequence[Any]], RunSpec]  # their values as a spec, with defaults for invalid ones
    filled: list[Block]  # the outputs of `fill`: the form and its summary
    fill: Callable[[RunSpec], Updates]
    begins: list[Block]  # the outputs of `begin`: the message, the preset and `filled`
    begin: Callable[[str], Updates]  # the initial state of an opened page, with the form that the browser has kept
    lists: list[Block]  # the outputs of `list_choices`: the controls that list models and data sets
    list_choices: Callable[[], Updates]
    other: gr.Textbox  # YAML of an evaluation or export that was loaded here; "" = none
    gpus: GpusPanel


def build(
    words: Words,
    workplace: Workplace,
    message: gr.HTML,
    user: Callable[[gr.Request], str],
    selected: gr.Textbox,
) -> TrainTab:
    """The tab in the current context. `message` shows messages; `user` is the user's name; `selected` gets the id of a
    started run."""
    context = Context(words, workplace, message, user, selected)
    settings = SettingsPanel(context, first_preset(workplace))
    summary = SummaryPanel(context, settings)
    sweep = SweepPanel(context, settings)
    gpus = GpusPanel(words, gpus_html.bars, "train-gpus", visible=True)
    own = OwnPresetsPanel(context, settings)
    presets, load = PresetPanel(context, settings, summary, own), LoadPanel(context, summary)

    with gr.Row(elem_classes="split", equal_height=False):
        with gr.Column(scale=7, min_width=420, elem_classes="sheet"):
            with gr.Row(elem_classes="above"):
                with gr.Column():
                    settings.layout_of_preset()
                    own.layout()
                SearchPanel(context).layout()
            settings.layout()
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
            settings.layout_of_name()
            summary.layout()
            gpus.layout()
            sweep.layout()
            load.layout()
            summary.layout_of_marks()

    for panel in (settings, summary, gpus, sweep, own, presets, load):
        panel.wire()
    return TrainTab(
        settings.inputs,
        lambda held: settings.read(held)[0],
        summary.filled,
        summary.fill,
        presets.begins,
        presets.begin,
        settings.lists,
        settings.list_choices,
        load.other,
        gpus,
    )
