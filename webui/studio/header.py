"""The head of the page: the name of the studio, its language, light or dark mode, and the logged-in user."""

from __future__ import annotations

from html import escape

import gradio as gr

from webui import theme
from webui.words import Words

MARK = (theme.FOLDER / "favicon.svg").read_text(encoding="utf-8").strip()


def header(words: Words, name: str, root: str) -> str:
    """The head as HTML; `name` is the logged-in user, "" without a login."""
    languages = "".join(
        f'<a href="#" data-language="{code}" lang="{code}"{" class=on" if code == words.language else ""}>{label}</a>'
        for code, label in (("en", "EN"), ("zh", "中文"))
    )
    out = ""
    if name:
        out = (
            f'<span class="who">{escape(name)}</span><form method="post" action="{escape(root)}/logout">'
            f"<button>{escape(words('sign-out'))}</button></form>"
        )
    return (
        f'<header><div class="brand">{MARK}<b>{escape(words("title"))}</b>'
        f"<span>{escape(words('subtitle'))}</span></div>"
        f'<nav>{out}<span class="switch">{languages}</span>'
        f'<button class="theme" data-theme-switch title="{escape(words("theme"))}" '
        f'aria-label="{escape(words("theme"))}">◐</button>'
        "</nav></header>"
    )


def user(request: gr.Request) -> str:
    """The user's name, which the login added to the request; "" without a login."""
    return getattr(request.state, "user", "") or ""
