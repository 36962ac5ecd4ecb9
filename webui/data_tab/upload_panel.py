"""Uploading a file: it is added to the data folder and opened, so that its columns can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine.core.problems import Problem
from engine.data import data_jobs
from engine.data.owners import file_id
from webui import notices
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking


class UploadPanel(Panel):
    def __init__(self, context: Context, sets: SetList):
        super().__init__(context)
        self.sets = sets

    def layout(self) -> None:
        self.button = gr.UploadButton(self.words("upload"), type="filepath", elem_id="upload", elem_classes="acts drop")
        gr.HTML(f'<p class="quiet">{escape(self.words("upload-help"))}</p>', elem_classes="under-drop")

    def wire(self) -> None:
        self.button.upload(
            self.receive,
            self.button,
            [self.message, self.chosen, self.sets.html],
            **QUIET | {"show_progress": "minimal", "show_progress_on": self.sets.html},
        )

    @refusal_as_message
    def receive(self, path: str | None) -> Updates:
        """Open the file in the data folder, with a message about anything unusual."""
        if not path:
            return gr.skip()
        source = Path(path)
        settings = {
            "data": str(self.folder.path),
            "source": str(source),
            "called": source.name,
            "at": source.stat().st_mtime_ns,
            "by": asking().name,
        }
        with acting(self.workplace.saves, "upload", source.name):
            result = data_jobs.wait(data_jobs.start(self.workplace.saves, "receive", settings))
        source.unlink(missing_ok=True)
        return self.sets.opening(file_id(result["file"])) | {self.message: self._message(result)}

    def _message(self, result: Mapping[str, Any]) -> str:
        problems, notes = (
            [Problem(entry["code"], "", entry["values"]) for entry in result[key]] for key in ("problems", "notes")
        )
        if problems:
            return notices.refused(problems, self.words)
        arrived = self.words("arrived", file=result["file"])
        return notices.toast(" ".join([arrived, *(notices.sentence(note, self.words) for note in notes)]))
