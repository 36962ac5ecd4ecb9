"""The head of the open set: what is known about it immediately, and actions on all of it."""

from __future__ import annotations

from html import escape

import gradio as gr
from gradio.blocks import Block

from engine.data import dataset_info_edits, owners, uploads
from engine.data.owners import file_id
from webui import notices
from webui.data_tab import set_html
from webui.data_tab.data_folder import Selection, row_count
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking, hindrance


class HeadPanel(Panel):
    def __init__(self, context: Context, sets: SetList):
        super().__init__(context)
        self.sets = sets

    def layout(self) -> None:
        words = self.words
        self.nothing_open = gr.HTML(
            f'<div class="empty"><b>{escape(words("set-none"))}</b><p>{escape(words("set-none-help"))}</p></div>'
        )
        self.title = gr.HTML(elem_id="set-head")
        with gr.Row(elem_classes="buttons actions", visible=False) as self.of_folder:
            self.make = gr.Button(
                words("make-rows"), variant="primary", size="sm", elem_id="make-rows", elem_classes="acts"
            )
        with gr.Row(elem_classes="buttons actions", visible=False) as self.actions:
            self.use = gr.Button(words("use-set"), variant="primary", size="sm", elem_id="use-set")
            self.fetch = gr.Button(
                words("hub-fetch"), size="sm", visible=False, elem_id="get-set", elem_classes="acts owned-set"
            )
            self.remove = gr.Button(
                words("remove-set"), size="sm", elem_classes="acts owned-set hurts", elem_id="remove-set"
            )
        self.rights = gr.HTML(elem_id="set-rights")
        with gr.Row(visible=False, elem_classes="sure") as self.question:
            self.sure = gr.HTML()
            self.yes = gr.Button(words("yes-remove-set"), variant="stop", size="sm", elem_id="yes-remove", scale=0)
            self.no = gr.Button(words("cancel"), size="sm", scale=0)

    def wire(self) -> None:
        self.make.click(self.make_rows, self.chosen, [self.message, self.chosen, self.sets.html], **QUIET)
        self.remove.click(lambda: gr.update(visible=True), None, self.question, **QUIET)
        self.no.click(lambda: gr.update(visible=False), None, self.question, **QUIET)
        self.yes.click(self.remove_opened, self.chosen, [self.message, self.chosen, self.sets.html], **QUIET)

    @property
    def outputs(self) -> list[Block]:
        shown = [self.nothing_open, self.title, self.of_folder, self.actions, self.fetch, self.use, self.question]
        return [*shown, self.remove, self.sure, self.yes, self.rights]

    def opened(self, selection: Selection) -> Updates:
        count = row_count(selection.dataset) if selection.is_set else None
        return {
            self.nothing_open: gr.update(visible=False),
            self.title: set_html.title(selection, count, self.words),
            self.of_folder: gr.update(visible=False),
            self.actions: gr.update(visible=True),
            self.fetch: gr.update(visible=bool(selection.dataset.hub)),
            self.use: gr.update(visible=selection.is_set and selection.readable),
            self.question: gr.update(visible=False),
            self.rights: self._rights(selection),
        } | self._removal(selection)

    def _rights(self, selection: Selection) -> str:
        """A file that belongs to nobody may become anybody's set, but only operators may delete it."""
        owner = self.folder.owner(selection.id)
        selector = ".owned-set" if selection.is_set or owner else "#remove-set"
        return notices.denied(hindrance("remove-data", owner), selector, self.words)

    def _removal(self, selection: Selection) -> Updates:
        """A set leaves the list and its files stay; a file in no set can only be deleted."""
        what, words = "set" if selection.is_set else "file", self.words
        return {
            self.remove: words(f"remove-{what}"),
            self.sure: f"<p>{escape(words(f'sure-remove-{what}', name=selection.name))}</p>",
            self.yes: words(f"yes-remove-{what}"),
        }

    def closed(self) -> Updates:
        parts = [self.of_folder, self.actions, self.fetch, self.use, self.question]
        hidden = dict.fromkeys(parts, gr.update(visible=False))
        return {self.nothing_open: gr.update(visible=True), self.title: "", self.rights: ""} | hidden

    def folder_opened(self, id: str, name: str) -> Updates:
        """A folder of images, of which rows can be made."""
        return self.sets.marking(id) | {
            self.nothing_open: gr.update(visible=False),
            self.title: set_html.folder_head(name, self.words),
            self.of_folder: gr.update(visible=True),
        }

    def draft_opened(self) -> Updates:
        """Nothing: a draft has a head of its own."""
        return {self.nothing_open: gr.update(visible=False)}

    @refusal_as_message
    def make_rows(self, id: str) -> Updates:
        """Make rows of the images in the open folder, and open them."""
        with acting(self.workplace.saves, "derive", id):
            written = self.folder.make_rows(id)
            owners.claim(self.folder.path, map(file_id, written), asking().name)
        toast = notices.toast(self.words("rows-of-images", files=", ".join(written)))
        return self.sets.opening(file_id(written[0])) | {self.message: toast}

    @refusal_as_message
    def remove_opened(self, id: str) -> Updates:
        """Remove the set from the list, where its files stay; delete a file that is in no set."""
        selection = self.folder.select(id)
        with acting(self.workplace.saves, "remove-data", selection.id, self.folder.owner(selection.id)):
            if selection.is_set:
                dataset_info_edits.remove(self.folder.path, selection.name)
            else:
                uploads.remove(self.folder.path, selection.name)
            owners.claim(self.folder.path, [selection.id], "")
        toast = notices.toast(self.words("set-removed" if selection.is_set else "file-removed", name=selection.name))
        return self.sets.opening("") | {self.message: toast}
