"""Plain text as HTML."""

from __future__ import annotations

from html import escape


def lines(text: str) -> str:
    """The text with its line breaks."""
    return escape(text).replace("\n", "<br>")
