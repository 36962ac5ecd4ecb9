"""The mark of the best run of a sweep."""

from __future__ import annotations

from html import escape

from webui.words import Words


def star(words: Words) -> str:
    """A star that says what it means."""
    name = escape(words("sweep-best"))
    return f'<span class="star" role="img" aria-label="{name}" title="{name}">★</span>'
