"""The Export tab: finished runs as models or adapters for other programs.

    form_panel      what is exported and how, and a preview of the export
    export_list     the exports and their progress
    upload_panel    uploading one of them to a hub

`export_specs`, `controls` and the modules that write HTML have no components: they are functions of their arguments.
What is shown of an export is what `engine.worker.export` has written to its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.spec.run_spec import RunSpec
from webui.export_tab.export_list import ExportList
from webui.export_tab.export_specs import with_export
from webui.export_tab.form_panel import FormPanel
from webui.export_tab.panel import Context
from webui.export_tab.upload_panel import UploadPanel
from webui.panels import Updates
from webui.words import Words


@dataclass(frozen=True)
class ExportTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., Updates]  # the choice, and the exports; its output is `outputs`
    inputs: list[Block]  # inputs of `arrive`: the chosen runs, and the other controls
    outputs: list[Block]
    exports: gr.HTML  # its `select` event names an export to be used in the form
    filled: list[Block]  # outputs of `fill`
    fill: Callable[[ExportSpec], Updates | None]  # None if none of the adapters is the result of a run here
    use: Callable[[str, RunSpec], RunSpec]  # the id of an export and the form's values → its new values


def build(
    words: Words, workplace: Workplace, root: str, message: gr.HTML, user: Callable[[gr.Request], str]
) -> ExportTab:
    """The tab in the current context. `message` shows messages; `user` is the name of the user."""
    context = Context(words, workplace, root, message, user)
    uploads = UploadPanel(context)
    exports = ExportList(context, uploads)
    form = FormPanel(context, exports)

    with gr.Row(elem_classes="split", equal_height=False):
        form.layout()
    exports.layout()
    uploads.layout()

    for panel in (form, exports, uploads):
        panel.wire()
    return ExportTab(
        exports.timer,
        form.arrive,
        form.inputs,
        form.outputs,
        exports.html,
        form.filled,
        form.fill,
        lambda id, spec: with_export(runs.get(workplace.saves, id), spec),
    )
