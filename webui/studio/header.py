"""The head of the page: the name of the studio, its language, light or dark mode, the logged-in user, and what a
viewer cannot do."""

from __future__ import annotations

from collections.abc import Collection
from html import escape

import gradio as gr

from engine.core.rights import Person, may
from webui import theme
from webui.studio.first_steps import texts_file
from webui.words import Words

MARK = (theme.FOLDER / "favicon.svg").read_text(encoding="utf-8").strip()


def header(words: Words, person: Person, root: str, pages: Collection[str] = (), known_steps: str = "") -> str:
    """The head as HTML; the person has no name without a login. `pages` of their account can be used:
    "logout", and "password" to change it. `known_steps`: what is known of the first steps
    (`first_steps.known_of`)."""
    languages = "".join(
        f'<a href="#" data-language="{code}" lang="{code}"{" class=on" if code == words.language else ""}>{label}</a>'
        for code, label in (("en", "EN"), ("zh", "中文"))
    )
    link = f'<a class="own" href="{escape(root)}/notifications">{escape(words("notifications"))}</a>'
    own = "" if may(person, "notify") else link
    out, note = own, ""
    if person.name:
        name = f"{escape(person.name)}<small>{escape(words(f'role-of-{person.role}'))}</small>"
        out = f'<span class="who">{name}</span>'
        if "password" in pages:
            change = escape(words("change-password"))
            out = f'<a class="who" href="{escape(root)}/password" title="{change}">{name}</a>'
        out += f'{own}<a class="own" href="{escape(root)}/tokens">{escape(words("tokens"))}</a>'
        if "logout" in pages:
            leave = escape(words("sign-out"))
            out += f'<form method="post" action="{escape(root)}/logout"><button>{leave}</button></form>'
    steps, known = escape(words("tour-open")), f" data-{known_steps}" if known_steps else ""
    tour = (
        f'<button class="theme" data-tour="{texts_file(words.language)[0]}"{known} '
        f'title="{steps}" aria-label="{steps}">?</button>'
    )
    if refused := may(person, "start"):
        tour = ""
        note = f'<p class="denied" data-denies=".acts, .owned">{escape(refused.text(words.language))}</p>'
    return (
        f'<header><div class="brand">{MARK}<b>{escape(words("title"))}</b>'
        f"<span>{escape(words('subtitle'))}</span></div>"
        f'<nav>{out}{tour}<span class="switch">{languages}</span>'
        f'<button class="theme" data-theme-switch title="{escape(words("theme"))}" '
        f'aria-label="{escape(words("theme"))}">◐</button>'
        f"</nav></header>{note}"
    )


def user(request: gr.Request) -> str:
    """The user's name, which the login added to the request; "" without a login."""
    return getattr(request.state, "user", "") or ""
