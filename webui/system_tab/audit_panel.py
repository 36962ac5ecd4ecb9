"""The audit, for operators: the newest actions of all users, and a search."""

from __future__ import annotations

from html import escape

import gradio as gr

from engine.core import audit
from engine.core.audit import Entry
from engine.core.rights import RIGHTS
from engine.launch.workspace import Workplace
from webui import notices
from webui.events import LATEST, QUIET
from webui.numbers import moment
from webui.panels import Panel, Updates
from webui.people import hindrance
from webui.words import Words

MAX_LINES = 200
# What is recorded besides the actions of `engine.core.rights`: of the pages of one's own, and of the command line.
OF_PEOPLE = ("sign-in", "sign-out", "password", "token-add", "token-revoke")
ACTIONS = (*RIGHTS, *OF_PEOPLE)
DOTS = {"done": "finished", "refused": "interrupted", "failed": "failed"}  # outcomes → dots as used for runs


class AuditPanel(Panel):
    def __init__(self, words: Words, workplace: Workplace):
        self.words, self.saves = words, workplace.saves

    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("audit"), open=False, elem_classes="fold", elem_id="audit") as self.part:
            gr.HTML(f'<p class="quiet">{escape(words("audit-help"))}</p>')
            self.text = gr.Textbox(
                placeholder=words("audit-search"),
                show_label=False,
                container=False,
                max_lines=1,
                label=words("audit-search"),
                elem_id="audit-search",
            )
            self.lines = gr.HTML(elem_id="audit-lines")

    def wire(self) -> None:
        self.part.expand(self.show, self.text, self.lines, **QUIET)
        self.text.change(self.show, self.text, self.lines, **LATEST)

    def show(self, text: str | None) -> Updates:
        if problem := hindrance("read-audit"):
            return {self.lines: notices.listed([problem], self.words)}
        try:
            return {self.lines: lines_html(audit.read(self.saves, MAX_LINES, text or ""), self.words)}
        except OSError as error:
            return {self.lines: f'<p class="empty">{escape(error.strerror or str(error))}</p>'}


def lines_html(entries: list[Entry], words: Words) -> str:
    """A row for each action, the newest first."""
    if not entries:
        return f'<p class="empty">{escape(words("audit-none"))}</p>'
    names = ("when", "user", "address", "action", "what", "outcome")
    heads = "".join(f"<th>{escape(words(f'audit-{name}'))}</th>" for name in names)
    rows = "".join(_row(entry, words) for entry in entries)
    return f'<div class="wide"><table class="runs"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(entry: Entry, words: Words) -> str:
    outcome, _, codes = entry.outcome.partition(": ")
    known = outcome in DOTS
    label = words(f"audit-{outcome}") if known else outcome
    dot = f'<span class="dot {DOTS[outcome]}"></span>' if known else ""
    action = words(f"action-{entry.action}") if entry.action in ACTIONS else entry.action
    cells = (moment(entry.at), entry.user or "—", entry.address or "—", action, entry.what)
    last = f'<td title="{escape(codes)}">{dot} {escape(label)}</td>'
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}{last}</tr>"
