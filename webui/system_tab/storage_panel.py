"""Disk space that can be freed: what can be deleted without losing a result is listed first and deleted on request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import gradio as gr

from engine.launch.workspace import Workplace
from engine.runs import prune, runs
from engine.runs.prune import Removable
from webui import notices
from webui.events import QUIET, SILENT
from webui.numbers import size
from webui.panels import Panel, Updates, hidden_value, refusal_as_message
from webui.people import acting, asking, hindrance
from webui.words import Words

USUAL_DAYS = 7
MAX_ITEMS_LISTED = 200


class StoragePanel(Panel):
    def __init__(self, words: Words, workplace: Workplace, message: gr.HTML):
        self.words, self.saves, self.message = words, workplace.saves, message

    def layout(self) -> None:
        words = self.words
        gr.HTML(f'<h3>{escape(words("storage"))}</h3><p class="lead">{escape(words("storage-help"))}</p>')
        with gr.Row(elem_classes="buttons"):
            named = [(words(f"storage-{kind}"), kind) for kind in prune.KINDS]
            self.kinds = gr.CheckboxGroup(
                named,
                value=list(prune.KINDS),
                show_label=False,
                container=False,
                elem_id="storage-kinds",
                label=words("storage"),
            )
        with gr.Row(elem_classes="buttons beside-a-field"):
            self.days = gr.Number(
                USUAL_DAYS, label=words("storage-days"), minimum=0, maximum=100_000, scale=0, min_width=220
            )
            self.look = gr.Button(
                words("storage-list"), size="sm", elem_id="storage-list", scale=0, elem_classes="acts"
            )
            self.remove = gr.Button(
                words("storage-remove"),
                size="sm",
                elem_id="storage-remove",
                elem_classes="acts hurts",
                scale=0,
                visible=False,
            )
        with gr.Row(visible=False, elem_classes="sure") as self.sure:
            gr.HTML(f"<p>{escape(words('storage-sure'))}</p>")
            self.yes = gr.Button(words("storage-yes"), variant="stop", size="sm", elem_id="storage-yes", scale=0)
            self.no = gr.Button(words("cancel"), size="sm", scale=0)
        self.items = gr.HTML(elem_id="storage-items")
        self.listed = hidden_value()  # paths of what was listed, as JSON: nothing else is deleted

    def wire(self) -> None:
        chosen, shown = [self.kinds, self.days], [self.items, self.listed, self.remove, self.sure]
        self.look.click(self.list_items, chosen, shown, **SILENT)
        gr.on([self.kinds.change, self.days.change], self.nothing, chosen, shown, **QUIET)
        self.remove.click(lambda: gr.update(visible=True), None, self.sure, **QUIET)
        self.no.click(lambda: gr.update(visible=False), None, self.sure, **QUIET)
        self.yes.click(self.remove_items, [self.listed, *chosen], [self.message, *shown], **SILENT)

    def list_items(self, kinds: list[str] | None, days: float | None) -> Updates:
        if days is None or days < 0:
            return self.nothing() | {self.items: f'<p class="empty">{escape(self.words("storage-days-bad"))}</p>'}
        items = self._chosen(kinds, days)
        return {
            self.items: items_html(items, self.words),
            self.listed: json.dumps([str(item.path) for item in items]),
            self.remove: gr.update(visible=bool(items)),
            self.sure: gr.update(visible=False),
        }

    def nothing(self, *_: Any) -> Updates:
        """Nothing is listed, because the choice has changed."""
        hidden = gr.update(visible=False)
        return {self.items: "", self.listed: "", self.remove: hidden, self.sure: hidden}

    @refusal_as_message
    def remove_items(self, listed: str, kinds: list[str] | None, days: float | None) -> Updates:
        """Delete what was listed and can still be deleted, whatever is ticked now."""
        paths = set(json.loads(listed or "[]"))
        items = self._own(item for item in prune.removable(self.saves) if str(item.path) in paths)
        with acting(self.saves, "free-space", ", ".join(_name(item) for item in items), asking().name):
            gone = prune.remove(self.saves, items)
        freed = size(sum(item.bytes for item in gone))
        toast = notices.toast(self.words("storage-removed", count=len(gone), size=freed))
        return {self.message: toast} | self.list_items(kinds, days)

    def _chosen(self, kinds: list[str] | None, days: float | None) -> list[Removable]:
        kinds = [kind for kind in kinds or () if kind in prune.KINDS]
        return self._own(prune.removable(self.saves, kinds, max(days or 0, 0)))

    def _own(self, items: Iterable[Removable]) -> list[Removable]:
        """Those that the person who is asking may delete: of their own runs; for operators, all."""
        owners = {run.id: run.by for run in runs.find(self.saves)}
        return [item for item in items if not hindrance("free-space", owners.get(item.run, ""))]


def _name(item: Removable) -> str:
    return f"{item.run} {item.path.name}".strip()


def items_html(items: Sequence[Removable], words: Words) -> str:
    """The largest first; of very many, only the first and the number of the others."""
    if not items:
        return f'<p class="empty">{escape(words("storage-none"))}</p>'
    total = size(sum(item.bytes for item in items))
    rows = "".join(
        f"<tr><td>{escape(words(f'storage-{item.kind}'))}</td><td>{escape(item.run or '—')}</td>"
        f"<td>{escape(item.path.name)}</td><td>{size(item.bytes)}</td></tr>"
        for item in items[:MAX_ITEMS_LISTED]
    )
    left = len(items) - MAX_ITEMS_LISTED
    more = f'<p class="empty">{escape(words("storage-more", count=left))}</p>' if left > 0 else ""
    summary = f'<p class="lead"><b>{escape(words("storage-total", count=len(items), size=total))}</b></p>'
    return f'{summary}<table class="runs">{rows}</table>{more}'
