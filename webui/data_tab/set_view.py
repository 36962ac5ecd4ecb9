"""Opening a set: every panel that shows something of it is refreshed."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.data import uploads
from webui import notices
from webui.data_tab.data_folder import Selection, is_draft
from webui.data_tab.documents_panel import DocumentsPanel
from webui.data_tab.draft_panel import DraftPanel
from webui.data_tab.head_panel import HeadPanel
from webui.data_tab.panel import Context, Panel
from webui.events import LATEST, on_chosen
from webui.panels import Updates, refusal_as_message
from webui.people import acting


class SetView(Panel):
    """`tabs` are the parts of an open set: "rows", "check", "seen" and "columns"; `panels` those besides the ones that
    are named."""

    def __init__(
        self,
        context: Context,
        tabs: gr.Tabs,
        head: HeadPanel,
        draft: DraftPanel,
        documents: DocumentsPanel,
        panels: Sequence[Panel],
    ):
        super().__init__(context)
        self.tabs, self.head, self.draft, self.documents = tabs, head, draft, documents
        self.panels = [head, draft, documents, *panels]

    def wire(self, sheet: gr.Dropdown) -> None:
        self.chosen.change(self.open, self.chosen, self.outputs, js="(id) => athanorSet(id)", **LATEST)
        on_chosen(sheet, self.choose_sheet, [self.chosen, sheet], self.outputs)

    @property
    def outputs(self) -> list[Block]:
        return [self.tabs, *(output for panel in self.panels for output in panel.outputs), self.message]

    def open(self, id: str) -> Updates:
        """Everything about one set or file; nothing if there is none; of a folder of images, that it has no rows."""
        if not id:
            return self.closed()
        if is_draft(id):
            return self.draft_opened(id)
        if name := self.folder.image_folder(id):
            return self.closed() | self.head.folder_opened(id, name)
        try:
            selection = self.folder.select(id)
        except Refusal as refusal:
            return self.closed() | {self.message: notices.refused(refusal.problems, self.words)}
        return self.opened(selection)

    def opened(self, selection: Selection) -> Updates:
        part = "rows" if selection.is_set and selection.readable else "columns"
        updates: Updates = {self.tabs: gr.Tabs(visible=bool(selection.dataset.files), selected=part)}
        for panel in self.panels:
            updates |= panel.opened(selection)
        return updates

    def draft_opened(self, id: str) -> Updates:
        """A draft of rows from documents, in place of a set."""
        try:
            opened = self.draft.draft_opened(id) | self.documents.marking(id)
        except Refusal as refusal:
            return self.closed() | {self.message: notices.refused(refusal.problems, self.words)}
        return self.closed() | self.head.draft_opened() | opened

    def closed(self) -> Updates:
        updates: Updates = {self.tabs: gr.update(visible=False)}
        for panel in self.panels:
            updates |= panel.closed()
        return updates

    @refusal_as_message
    def choose_sheet(self, id: str, sheet: str) -> Updates:
        """Make the file again from another sheet of its workbook, and show everything about it."""
        selection = self.folder.select(id)
        if selection.is_set or not sheet:
            return gr.skip()
        with acting(self.workplace.saves, "describe", f"{id}: {sheet}", self.folder.owner(id)):
            notes = uploads.choose_sheet(self.folder.path / selection.name, sheet)
        text = " ".join(
            [self.words("sheet-read", sheet=sheet), *(notices.sentence(note, self.words) for note in notes)]
        )
        return self.open(id) | {self.message: notices.toast(text)}
