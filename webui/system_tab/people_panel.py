"""Quotas: what one uses and may use; for operators, of all users, with the way to the page where they are changed."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from engine.core.problems import Refusal
from engine.core.rights import OPERATOR
from engine.launch.workspace import Workplace
from engine.runs import accounts
from webui import notices, people_html
from webui.events import QUIET
from webui.panels import Panel, Updates
from webui.people import asking
from webui.words import Words


class PeoplePanel(Panel):
    """Filled when it is opened. Without a login there is nobody to limit, so it is not built."""

    def __init__(self, words: Words, workplace: Workplace, users_file: Path, root: str):
        self.words, self.workplace, self.users_file, self.root = words, workplace, users_file, root

    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("people"), open=False, elem_classes="fold", elem_id="people") as self.part:
            self.lines = gr.HTML(elem_id="people-lines")

    def wire(self) -> None:
        self.part.expand(self.show, None, self.lines, **QUIET)

    def show(self) -> Updates:
        """What the person who is asking may see."""
        words, person = self.words, asking()
        try:
            if person.role == OPERATOR:
                link = f'<a href="{escape(self.root)}/{people_html.PATH}">{escape(words("people-change"))}</a>'
                everybody = accounts.accounts(self.workplace, self.users_file)
                return {self.lines: f"{people_html.table(everybody, words)}<p>{link}</p>"}
            own = accounts.account(self.workplace, person.name, self.users_file)
        except Refusal as refusal:
            return {self.lines: notices.listed(refusal.problems, words)}
        help = f'<p class="quiet">{escape(words("people-own-help"))}</p>'
        return {self.lines: help + people_html.table([own], words)}
