"""Rows of a data set as HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.data.browse import BrowsedRow
from engine.data.images import IMAGE_MARK
from engine.data.row_images import TEXT_MARK
from webui import notices
from webui.thumbnails import pictures
from webui.words import Words

CHARACTERS_UNFOLDED = 700  # of one text; the rest of a longer one is folded
RAW_CHARACTERS = 4_000  # of a row that could not be parsed


def page(rows: Sequence[BrowsedRow], words: Words, text: str = "") -> str:
    """Rows as conversations, each with its place; bad ones with the reason. The words of `text` are highlighted."""
    return f'<div class="rows">{"".join(_row(row, words, text) for row in rows)}</div>'


def _row(row: BrowsedRow, words: Words, text: str) -> str:
    place = f"<header><b>{row.number:,}</b><span>{escape(str(row.place))}</span></header>"
    if row.problem:
        raw = (
            json.dumps(row.row, ensure_ascii=False, indent=1, default=str)[:RAW_CHARACTERS]
            if row.row is not None
            else ""
        )
        wrong = f'<p class="wrong">{escape(notices.sentence(row.problem, words))}</p>'
        return f'<article class="bad">{place}{wrong}{f"<pre>{_marked(raw, text)}</pre>" if raw else ""}</article>'
    assert row.example is not None  # because there is no problem
    notes = "".join(
        f'<p class="quiet">{escape(notices.sentence(note, words))}</p>' for note in row.example.get("notes", ())
    )
    return f"<article>{place}{conversation(row.example, words, text)}{notes}</article>"


def conversation(example: Mapping[str, Any], words: Words, text: str = "") -> str:
    """A canonical row for people to read."""
    if "text" in example:
        return f'<div class="speech"><div class="said">{_folded(example["text"], text)}</div></div>'
    weights = iter(example.get("weights", ()))
    turns = [
        _turn(turn["role"], turn, words, text, next(weights, 1.0) if turn["role"] == "assistant" else 1.0)
        for turn in example["messages"]
    ]
    for side in ("chosen", "rejected"):
        turns += [_turn(side, turn, words, text) for turn in example.get(side, ())]
    if example.get("label") is not None:
        turns.append(_turn("label", {"content": words("thumb-up" if example["label"] else "thumb-down")}, words, ""))
    if example.get("tools"):
        names = ", ".join(str(tool.get("function", {}).get("name", "")) for tool in example["tools"])
        turns.insert(0, _turn("tools", {"content": names}, words, text))
    return "".join(turns)


def _turn(role: str, turn: Mapping[str, Any], words: Words, text: str, weight: float = 1.0) -> str:
    content = turn["content"].replace(IMAGE_MARK, TEXT_MARK) if turn.get("images") else turn["content"]
    body = _folded(content, text) if content else ""
    body += pictures(turn.get("images", ()))
    if reasoning := turn.get("reasoning_content"):
        body = f'<div class="thought">{_folded(reasoning, text)}</div>{body}'
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        body += f"<code>{_marked(function['name'] + f'({arguments})', text)}</code>"
    name = escape(words(f"turn-{role}"))
    if weight != 1:
        name += f" <em>{escape(words('turn-weight', weight=f'{weight:g}') if weight else words('turn-untrained'))}</em>"
    return f'<div class="speech {escape(role)}"><span>{name}</span><div class="said">{body}</div></div>'


def _folded(content: str, text: str) -> str:
    if len(content) <= CHARACTERS_UNFOLDED:
        return _marked(content, text)
    shown, rest = content[:CHARACTERS_UNFOLDED], content[CHARACTERS_UNFOLDED:]
    summary = f"<summary>{_marked(shown, text)}<i>… {len(rest):,}</i></summary>"
    return f"<details>{summary}{_marked(rest, text)}</details>"


def _marked(content: str, text: str) -> str:
    """Escaped, with every searched word highlighted."""
    searched = [re.escape(word) for word in text.split()]
    if not searched:
        return escape(content)
    parts = re.split(f"({'|'.join(searched)})", content, flags=re.IGNORECASE)
    return "".join(f"<mark>{escape(part)}</mark>" if number % 2 else escape(part) for number, part in enumerate(parts))
