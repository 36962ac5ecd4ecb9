"""The settings that differ from those of the preset, as HTML: each with its values before and now, and a button."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.runs.compare import Difference
from webui.form.settings import element_id, part_id
from webui.words import Words

ALL = "*"  # in place of the path of one setting
MAX_OPEN = 4  # longer lists are closed at first


def changed(changes: Sequence[Difference], words: Words) -> str:
    """The list, which the reader can open and close; nothing if there are no changes."""
    if not changes:
        return ""
    rows = "".join(row(change, words, resettable=True) for change in changes)
    opened = " open" if len(changes) <= MAX_OPEN else ""
    summary = escape(words("changed", count=len(changes)))
    everything = _button(ALL, words("changed-reset-all"), words("changed-reset-all"))
    return (
        f'<details class="changed" data-fold="changed"{opened}><summary>{summary}</summary>'
        f"<ul>{rows}</ul>{everything if len(changes) > 1 else ''}</details>"
    )


def row(change: Difference, words: Words, resettable: bool = False) -> str:
    """A setting, linked to its field, with its values before and now."""
    path, label = change.path, words.label(change.path)
    before, now = (escape(words.value(path, value)) for value in change.values)
    return (
        f'<li><a href="#{element_id(path)}" data-part="{part_id(path)}">{escape(label)}</a>'
        f"<span><s>{before}</s> → <b>{now}</b></span>"
        f"{_button(path, words('changed-reset'), words('changed-reset-one', name=label)) if resettable else ''}</li>"
    )


def _button(path: str, label: str, title: str) -> str:
    return f'<button type="button" data-reset="{path}" aria-label="{escape(title)}">{escape(label)}</button>'
