"""Loading settings: a spec, or a command or file of another program, pasted or from a file."""

from __future__ import annotations

import time

import gradio as gr
from gradio.blocks import Block

from engine import importer
from engine.core.problems import Refusal, problem
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.events import QUIET
from webui.panels import Updates, hidden_value
from webui.train_tab import imported_html
from webui.train_tab.choices import local_model
from webui.train_tab.panel import Context, Panel
from webui.train_tab.summary_panel import SummaryPanel

MAX_YAML_CHARACTERS = 256 * 1024  # a spec has a few hundred
SUFFIXES = [".yaml", ".yml", ".sh", ".bat", ".cmd", ".ps1", ".txt", ".json"]


class LoadPanel(Panel):
    """`other` is the YAML of an evaluation or an export that was loaded here; the page passes it to its own tab."""

    def __init__(self, context: Context, summary: SummaryPanel):
        super().__init__(context)
        self.summary = summary
        self.other = hidden_value()

    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("load-settings"), open=False, elem_classes="fold"):
            self.paste = gr.Textbox(
                label=words("load-paste"), lines=5, max_lines=12, elem_classes="mono", elem_id="paste"
            )
            with gr.Row(elem_classes="buttons"):
                self.load = gr.Button(words("load"), size="sm")
                self.file = gr.UploadButton(
                    words("load-file"), file_types=SUFFIXES, type="binary", size="sm", elem_id="load-file"
                )
            self.imported = gr.HTML(elem_id="imported")

    def wire(self) -> None:
        self.load.click(self.load_text, self.paste, self.outputs, **QUIET)
        self.file.upload(self.load_file, self.file, self.outputs, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.message, self.imported, self.other, *self.summary.filled]

    def load_text(self, text: str) -> Updates:
        """The form with the settings in the text, and what could not be imported."""
        try:
            if len(text) > MAX_YAML_CHARACTERS:
                raise Refusal(problem("spec-too-long", "", limit=MAX_YAML_CHARACTERS))
            loaded = importer.read_any(text, self._context_length)
        except Refusal as refusal:
            listed = notices.listed(refusal.problems, self.words)
            return self._answer(notices.refused(refusal.problems, self.words), listed)
        notes = imported_html.imported(loaded, self.words)
        if not isinstance(loaded.spec, RunSpec):
            message = notices.toast(self.words(f"loaded-{loaded.spec.kind}"))
            # Pasting the same text again counts as a change.
            return self._answer(message, notes, other=f"# {time.time_ns()}\n{loaded.spec.to_yaml()}")
        lost = len(loaded.lost)
        message = self.words("loaded-with-notes", count=lost) if lost else self.words("loaded")
        return self._answer(notices.toast(message), notes) | self.summary.fill(loaded.spec)

    def load_file(self, content: bytes) -> Updates:
        try:
            text = importer.decoded(content)
        except Refusal:
            return self._answer(notices.toast(self.words("load-not-text"), "bad"))
        return self.load_text(text)

    def _answer(self, message: str, notes: str = "", other: str = "") -> Updates:
        return {self.message: message, self.imported: notes, self.other: other}

    def _context_length(self, name_or_path: str) -> int | None:
        model = local_model(name_or_path, self.workplace)
        return model.context_length if model else None
