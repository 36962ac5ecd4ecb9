"""The description of the open set: its name, the kind of its rows, and the role of each column."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.core.stages import Kind
from engine.data import browse, dataset_info_edits, owners, uploads
from engine.data.dataset_info_edits import ROLES
from engine.data.datasets import Dataset, dataset_of
from engine.data.encodings import encoding_key
from engine.data.owners import set_id
from webui import notices
from webui.data_tab import rows_html, set_html, sources
from webui.data_tab.data_folder import Selection, is_set
from webui.data_tab.head_panel import HeadPanel
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_entry import (
    ALL_ROLES,
    Description,
    columns_for,
    columns_for_kind,
    columns_in_encoding,
    entry_from,
    known_kind,
)
from webui.data_tab.set_list import SetList
from webui.events import LATEST, QUIET, on_chosen
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking

ROWS_SHOWN = 3


class ColumnsPanel(Panel):
    def __init__(self, context: Context, sets: SetList, head: HeadPanel):
        super().__init__(context)
        self.sets, self.head = sets, head

    def layout(self) -> None:
        self._layout_of_set()
        with gr.Column(elem_classes="grid grid-4"):
            self.roles = {role: self._role(role) for role in ALL_ROLES}
        with gr.Row(elem_classes="buttons"):
            self.save_button = gr.Button(
                self.words("save-set"), variant="primary", size="sm", elem_id="save-set", elem_classes="acts owned-set"
            )
        gr.HTML(f"<h2>{escape(self.words('mapped-rows'))}</h2>", elem_classes="section-title")
        self.mapped = gr.HTML(elem_id="mapped")

    def _layout_of_set(self) -> None:
        words = self.words
        choice = partial(gr.Dropdown, elem_classes="field field-choice", interactive=True)
        with gr.Column(elem_classes="grid grid-4"):
            self.name = gr.Textbox(
                label=words("set-name"), max_lines=1, elem_classes="field field-choice", elem_id="set-name"
            )
            self.kind = choice(
                [(words(f"set-{kind}"), kind) for kind in ROLES],
                value="chat",
                label=words("set-kind"),
                elem_id="set-kind",
            )
            self.encoding = choice(
                [("", "")],
                value="",
                label=words("encoding"),
                info=words("encoding-help"),
                visible=False,
                elem_id="set-encoding",
            )
            self.sheet = choice(
                [], value=None, label=words("sheet"), info=words("sheet-help"), visible=False, elem_id="set-sheet"
            )

    def _role(self, role: str) -> gr.Dropdown:
        """The control for the column with a role."""
        return gr.Dropdown(
            [],
            value="",
            label=self.words(f"role-{role}"),
            info=self.words(f"role-{role}-help"),
            elem_classes="field field-choice",
            elem_id=f"role-{role.replace('_', '-')}",
            interactive=True,
            allow_custom_value=True,
            min_width=120,
        )

    @property
    def controls(self) -> list[Block]:
        return [self.name, self.kind, self.encoding, *self.roles.values()]

    def wire(self) -> None:
        roles = list(self.roles.values())
        described = [self.chosen, *self.controls]
        read = [self.message, self.head.title, self.kind, *roles]
        # Leaving the list unchanged keeps the columns that were chosen.
        on_chosen(self.encoding, self.change_encoding, [self.chosen, self.encoding], read).then(
            self.show_mapped, described, self.mapped, **LATEST
        )
        self.kind.input(self.change_kind, [self.chosen, self.kind, self.encoding, *roles], roles, **LATEST).then(
            self.show_mapped, described, self.mapped, **LATEST
        )
        gr.on(
            [role.input for role in roles],
            self.show_mapped,
            described,
            self.mapped,
            **LATEST,
        )
        self.save_button.click(self.save, described, [self.message, self.chosen, self.sets.html], **QUIET)

    # What the controls show

    @property
    def outputs(self) -> list[Block]:
        return [*self.controls, self.sheet, self.mapped]

    def opened(self, selection: Selection) -> Updates:
        updates = self._described(selection.dataset) if selection.dataset.files else {}
        return updates | {self.sheet: self._sheets(selection), self.mapped: self._rows(selection.dataset)}

    def closed(self) -> Updates:
        return {self.sheet: gr.update(visible=False), self.mapped: ""}

    def _described(self, dataset: Dataset) -> Updates:
        existing, columns = columns_for(dataset)
        choices, open_question = sources.encodings(dataset, self.words)
        return {
            self.name: dataset.name,
            self.kind: dataset.kind,
            self.encoding: gr.update(choices=choices, value=dataset.encoding, visible=open_question),
        } | self._columns(dataset.kind, existing, columns)

    def _columns(self, kind: Kind, existing: list[str], columns: Mapping[str, str]) -> Updates:
        """The controls for the roles of this kind of rows, with their columns."""
        choices = [("—", ""), *((column, column) for column in existing)]
        return {
            control: gr.update(choices=choices, value=columns.get(role, ""), visible=role in ROLES[kind])
            for role, control in self.roles.items()
        }

    def _sheets(self, selection: Selection) -> Any:
        """The sheets from which a file can be made, if it is in no set yet; hidden without a choice."""
        names: list[str] = []
        current = ""
        if not selection.is_set:
            with contextlib.suppress(Refusal):
                names, current = uploads.sheets_of(self.folder.path / selection.name)
        return gr.update(choices=names, value=current or None, visible=len(names) > 1)

    def _rows(self, dataset: Dataset) -> str:
        """The first rows with these columns, or the reason why there are none."""
        try:
            return rows_html.page(browse.page(dataset, 1, ROWS_SHOWN), self.words)
        except Refusal as refusal:
            return notices.listed(refusal.problems, self.words)

    # Handlers

    def change_kind(self, id: str, kind: str, encoding: str, *columns: str) -> Updates:
        """The roles of another kind; chosen columns are kept, and others are guessed if possible."""
        try:
            dataset = self.folder.select(id).dataset
            existing, chosen = columns_for_kind(dataset, Description(kind, encoding, columns))
        except (Refusal, IndexError):
            return gr.skip()
        return self._columns(known_kind(kind), existing, chosen)

    def change_encoding(self, id: str, encoding: str) -> Updates:
        """The head and the names of the columns in this encoding."""
        try:
            selection = self.folder.select(id)
            name = encoding_key(encoding) if encoding else ""
            selection = replace(selection, dataset=replace(selection.dataset, encoding=name))
            existing, mapping = columns_in_encoding(selection.dataset)
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}
        except IndexError:  # not a file
            return gr.skip()
        title = set_html.title(selection, None, self.words)
        columns = self._columns(mapping.kind, existing, mapping.columns)
        return {self.head.title: title, self.kind: mapping.kind} | columns

    def show_mapped(self, id: str, name: str, kind: str, encoding: str, *columns: str) -> Updates:
        """The first rows with these columns."""
        try:
            _, entry = entry_from(self.folder, id, Description(kind, encoding, columns), self.words)
            html = self._rows(dataset_of(self.folder.path, name or "—", entry))
        except Refusal as refusal:
            html = notices.listed(refusal.problems, self.words)
        return {self.mapped: html}

    @refusal_as_message
    def save(self, id: str, name: str, kind: str, encoding: str, *columns: str) -> Updates:
        """Save the set under this name with this description; a file becomes a set."""
        dataset, entry = entry_from(self.folder, id, Description(kind, encoding, columns), self.words)
        replaced, owner = dataset.name if is_set(id) else "", self.folder.owner(id)
        right = "describe" if replaced or owner else "derive"  # a file that belongs to nobody may become anybody's set
        with acting(self.workplace.saves, right, f"{id} → {name}", owner):
            name = dataset_info_edits.save(self.folder.path, name, entry, instead_of=replaced)
            new_owner = owner if replaced else owner or asking().name
            owners.claim(self.folder.path, [set_id(name)], new_owner, instead_of=id if replaced else "")
            uploads.forget_workbook(dataset.files[0])
        toast = notices.toast(self.words("set-saved", name=name))
        return self.sets.opening(set_id(name)) | {self.message: toast}
