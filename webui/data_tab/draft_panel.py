"""The review of a draft: its rows, and what can be done with them and with the draft.

All of it is one HTML component, whose script sends what was clicked or typed. The page keeps which rows are shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal, problem
from engine.data.owners import set_id
from engine.documents import drafts, review, save
from engine.documents.drafts import Draft
from engine.documents.review import FILTERS, DraftRow
from webui import notices
from webui.data_tab import draft_html
from webui.data_tab.data_folder import Selection, is_draft, name_of
from webui.data_tab.draft_script import REVIEW_JS
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET, of_tick
from webui.panels import Updates, hidden_value, refusal_as_message
from webui.people import acting, asking, hindrance

POLL_SECONDS = 1.5
OF_ROWS = ("accept", "reject", "undo", "edit")  # actions on a single row


@dataclass(frozen=True)
class View:
    """Which rows are shown: a key of FILTERS, and the page of those, from 1."""

    filter: str = "open"
    page: int = 1

    @classmethod
    def read(cls, text: str) -> View:
        """The view that the page keeps; the first one if that cannot be read."""
        try:
            values = json.loads(text)
            view = cls(values["filter"], int(values["page"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls()
        return view if view.filter in FILTERS and 0 < view.page < 1_000_000 else cls()


class DraftPanel(Panel):
    def __init__(self, context: Context, sets: SetList):
        super().__init__(context)
        self.sets = sets
        self.view = hidden_value()
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self.actions: dict[str, Callable[[Draft, Mapping[str, Any]], str]] = {
            "accept": self._decide("accepted"),
            "reject": self._decide("rejected"),
            "undo": self._decide(""),
            "edit": self._edit,
            "accept-supported": self._accept_supported,
            "stop": self._stop,
            "continue": self._continue,
        }

    def layout(self) -> None:
        self.html = gr.HTML(elem_id="draft", js_on_load=REVIEW_JS)

    def wire(self) -> None:
        outputs = [self.message, self.chosen, self.sets.html, *self.outputs]
        self.html.select(self.act, [self.chosen, self.view], outputs, **QUIET)
        # Not while somebody is editing a row, whose boxes would be replaced.
        idle = "(id, view) => [id, document.querySelector('#draft .editing') ? '' : view]"
        self.timer.tick(self.refresh, [self.chosen, self.view], [self.message, *self.outputs], js=idle, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.html, self.view, self.timer]

    def opened(self, selection: Selection) -> Updates:
        return self.closed()

    def closed(self) -> Updates:
        return {self.html: "", self.timer: gr.Timer(active=False)}

    def draft_opened(self, id: str) -> Updates:
        """The panel for a draft. Raises Refusal if there is none for this person."""
        return self.shown(self._draft(id), View())

    def _draft(self, id: str) -> Draft:
        """The draft with an id of the page, if the person who is asking may see it. Raises Refusal."""
        draft = drafts.get(self.workplace.saves, name_of(id) if is_draft(id) else "")
        if refused := hindrance("review-draft", draft.owner):
            raise Refusal(refused)
        return draft

    def shown(self, draft: Draft, view: View) -> Updates:
        rows = review.rows_of(draft)
        fitting = [row for row in rows if FILTERS[view.filter](row)]
        last = max(-(-len(fitting) // draft_html.ROWS_PER_PAGE), 1)
        view = replace(view, page=min(view.page, last))
        counts = review.counts_of(draft, rows)
        return {
            self.html: draft_html.review(draft, counts, fitting, view.filter, view.page, last, self.words),
            self.view: json.dumps(asdict(view)),
            self.timer: gr.Timer(active=draft.state == "working"),
        }

    def refresh(self, id: str, view: str) -> Updates:
        """The draft as its process has filled it since; `view` is "" while a row is edited."""
        if not view:
            return gr.skip()
        try:
            updates = self.shown(self._draft(id), View.read(view)) if is_draft(id) else self.closed()
            return of_tick(self.timer, updates)
        except Refusal as refusal:
            return self.closed() | {self.message: notices.refused(refusal.problems, self.words)}

    @refusal_as_message
    def act(self, id: str, view: str, event: gr.EventData) -> Updates:
        """Do what was clicked, and show the draft as it is then."""
        what, now = event._data if isinstance(event._data, dict) else {}, View.read(view)
        action = str(what.get("act", ""))
        if action == "show":
            asked_for = View.read(json.dumps({"filter": what.get("filter"), "page": what.get("page", 1)}))
            return self.shown(self._draft(id), asked_for)
        draft = drafts.get(self.workplace.saves, name_of(id) if is_draft(id) else "")
        if action == "save":
            return self._save(draft, what)
        if action == "remove":
            return self._remove(draft)
        if action not in self.actions:
            raise Refusal(problem("draft-decision", decision=action[:40] or "—", known=", ".join(self.actions)))
        with self._acting(draft, action):
            text = self.actions[action](draft, what)
        return self.shown(draft, now) | ({self.message: notices.toast(text)} if text else {})

    def _acting(self, draft: Draft, action: str) -> AbstractContextManager[None]:
        """Each decision about a row is in the draft, with who made it; thousands of lines would bury the audit."""
        if action in OF_ROWS and not hindrance("review-draft", draft.owner):
            return nullcontext()
        return acting(self.workplace.saves, "review-draft", f"{draft.name}: {action}", draft.owner)

    # ---- what can be done; each returns what the reader is told, "" for nothing

    def _decide(self, decision: str) -> Callable[[Draft, Mapping[str, Any]], str]:
        def decide(draft: Draft, what: Mapping[str, Any]) -> str:
            row = review.find_row(review.rows_of(draft), str(what.get("row", "")))
            review.decide(draft, [row], decision, asking().name)
            return ""

        return decide

    def _edit(self, draft: Draft, what: Mapping[str, Any]) -> str:
        row = review.find_row(review.rows_of(draft), str(what.get("row", "")))
        question, answer = (str(what.get(name) or "") for name in ("question", "answer"))
        review.edit(draft, row, question, answer, asking().name)
        return ""

    def _accept_supported(self, draft: Draft, what: Mapping[str, Any]) -> str:
        count = review.accept_supported(draft, share_of(str(what.get("least", ""))), asking().name)
        return self.words("draft-accepted-supported", count=count)

    def _stop(self, draft: Draft, what: Mapping[str, Any]) -> str:
        drafts.stop(draft)
        return self.words("draft-stopping")

    def _continue(self, draft: Draft, what: Mapping[str, Any]) -> str:
        drafts.proceed(draft)
        return ""

    def _save(self, draft: Draft, what: Mapping[str, Any]) -> Updates:
        """Save the accepted rows, and open the new set."""
        rows: Sequence[DraftRow] = review.rows_of(draft)
        with self._acting(draft, "save"):
            name = save.save_accepted(draft, rows, str(what.get("format", "")), self.folder.path, asking().name)
        count = sum(map(FILTERS["accepted"], rows))
        toast = notices.toast(self.words("draft-saved", name=name, count=count))
        return self.sets.opening(set_id(name)) | {self.message: toast}

    def _remove(self, draft: Draft) -> Updates:
        with self._acting(draft, "remove"):
            drafts.remove(draft)
        toast = notices.toast(self.words("draft-removed", name=draft.name))
        return self.sets.opening("") | {self.message: toast}


def share_of(text: str) -> float:
    """A typed share as a number. Raises Refusal if it is none."""
    try:
        return float(text.strip().replace("%", "e-2"))
    except ValueError:
        raise Refusal(problem("draft-support", given=text[:40] or "—")) from None
