"""Plain text as HTML."""

from __future__ import annotations

from html import escape

from webui.words import Words


def lines(text: str) -> str:
    """The text with its line breaks."""
    return escape(text).replace("\n", "<br>")


def folded_reasoning(reasoning: str, words: Words, *, is_open: bool = False) -> str:
    """The reasoning before an answer, folded away; nothing if it is empty."""
    if not reasoning.strip():
        return ""
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(words('answer-thinking'))}</summary>"
        f"<div>{escape(reasoning.strip())}</div></details>"
    )
