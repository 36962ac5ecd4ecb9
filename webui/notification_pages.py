"""The page of one's own notifications, and what has happened to one's runs, for a page at which nobody looks.

Without a login, it is that of everybody who reaches the studio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.core import audit
from engine.core.problems import Refusal, problem, say
from engine.core.rights import Person, may
from engine.core.users import read_users
from engine.notifications import notice, sending, subscriptions
from engine.notifications.policy import POLICY_FILE, Policy, read_policy
from engine.notifications.services import SERVICES
from engine.notifications.subscriptions import EVERYBODY, Subscription
from engine.runs import notify
from engine.runs.notice_text import notice_of
from engine.runs.occurrences import Occurrence
from webui.account_html import denied_page
from webui.notification_html import View, page
from webui.people import person_of
from webui.reader_language import language_of
from webui.words import Words

MAX_FORM_FIELDS, MAX_FIELD_BYTES = 1000, 8192
OVERLAP_SECONDS = 10.0  # an end is seen a moment after the time that it has
SCRIPT = (Path(__file__).parent / "notifications.js").read_text(encoding="utf-8")


class NotificationPages:
    """`/notifications`, its script, and `/notifications/events`."""

    def __init__(self, saves: Path, users_file: Path | None, root: str):
        self.saves, self.root = saves, root
        self.place = subscriptions.place_beside(users_file)
        self.asking: dict[str, object] = {}  # for whom an address is checked or tested: a process for up to a minute

    def routes(self) -> list[Route]:
        return [
            Route("/notifications", self.answer, methods=["GET", "POST"]),
            Route("/notifications/events", self.events),
            Route("/notifications.js", _script),
        ]

    async def answer(self, request: Request) -> Response:
        """The page, after what a form of it asks for has been done."""
        person, language = person_of(request), language_of(request)
        if denied := may(person, "notify"):
            words = Words(language)
            return denied_page("notifications", words("notifications"), denied.text(language), words, self.root)
        done = error = ""
        if request.method == "POST":
            limits: dict[str, Any] = {"max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_FIELD_BYTES}
            async with request.form(max_files=0, **limits) as form:
                try:
                    done = await run_in_threadpool(self._act, form, person, language)
                except Refusal as refusal:
                    error = refusal.text(language)
        return await run_in_threadpool(self._page, person, Words(language), done, error)

    def _page(self, person: Person, words: Words, done: str, error: str) -> Response:
        status, remarks = HTTPStatus.UNPROCESSABLE_ENTITY if error else HTTPStatus.OK, []
        known, hint = Subscription(), ""
        try:
            known = subscriptions.of_person(self.place, person.name)
            policy = read_policy(self.saves)
            sending.refuse_if_disabled(policy)
            if not policy.studio and known.addresses:
                hint = words("notify-no-links", file=POLICY_FILE)
        except Refusal as refusal:
            remarks.append(refusal.text(words.language))
        others = tuple(name for name in self._users() if name != person.name)
        return page(View(self.root, known, done, error, tuple(remarks), hint, others, status), words)

    def _users(self) -> list[str]:
        return list(read_users(self.place.users_file)) if self.place.users_file else []

    def _act(self, form: FormData, person: Person, language: str) -> str:
        """Do what a form asks for, and say what was done. Raises Refusal."""
        actions: dict[str, Callable[[FormData, Person, str], str]] = {
            "remove": self._remove,
            "test": self._test,
            "choose": self._choose,
            "follow": self._follow,
            "url": self._add,
        }
        name = next((name for name in actions if name in form), "url")
        what = "add" if name == "url" else f"{name} {str(form.get(name))[:20]}"  # never the address
        with audit.acting(self.saves, person, "notify", what):
            return actions[name](form, person, language)

    def _add(self, form: FormData, person: Person, language: str) -> str:
        with self._asking(person):
            checked = sending.check(str(form.get("url", "")), read_policy(self.saves))
        subscriptions.add_address(self.place, person.name, language, checked)
        return say("notify-added", language, service=SERVICES[checked.service].name)

    def _remove(self, form: FormData, person: Person, language: str) -> str:
        subscriptions.remove_address(self.place, person.name, str(form.get("remove")))
        return say("notify-removed", language)

    def _choose(self, form: FormData, person: Person, language: str) -> str:
        events, hours = [str(event) for event in form.getlist("event")], _number(str(form.get("hours", "")))
        subscriptions.choose_events(self.place, person.name, language, events, hours)
        return say("notify-chosen", language)

    def _follow(self, form: FormData, person: Person, language: str) -> str:
        others = [str(other) for other in form.getlist("user")]
        subscriptions.follow(self.place, person.name, others)
        names = ", ".join(Words(language)("notify-everybody") if name == EVERYBODY else name for name in others)
        return say("notify-followed", language, names=names) if names else say("notify-follows-nobody", language)

    def _test(self, form: FormData, person: Person, language: str) -> str:
        policy = read_policy(self.saves)
        sending.refuse_if_disabled(policy)
        [address] = subscriptions.chosen(subscriptions.of_person(self.place, person.name), [str(form.get("test"))])
        with self._asking(person):
            message = notice.sample(time.time(), language, person.name, policy)
            [outcome] = sending.send([(address.url, message)], policy)
        if outcome:
            raise Refusal(outcome)
        return say("notify-sent", language, service=SERVICES[address.service].name)

    @contextmanager
    def _asking(self, person: Person) -> Iterator[None]:
        """Keep a person to one process that checks or tests an address. Raises Refusal if there is one."""
        mine = object()
        if self.asking.setdefault(person.name, mine) is not mine:
            raise Refusal(problem("notify-busy"))
        try:
            yield
        finally:
            del self.asking[person.name]

    async def events(self, request: Request) -> Response:
        """What has happened to the person's runs: `since` is what the last answer had in `at`."""
        person, language = person_of(request), language_of(request)
        since = _number(request.query_params.get("since", ""))
        now = time.time()
        since = now if math.isnan(since) else max(since, now - 3600)
        content = await run_in_threadpool(self._news, person.name, language, since, now)
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    def _news(self, name: str, language: str, since: float, now: float) -> dict[str, Any]:
        try:
            person = subscriptions.of_person(self.place, name)
        except Refusal:
            person = Subscription()
        owner = None if self.place.users_file is None else name
        news = notify.news(self.saves, owner, person, since - OVERLAP_SECONDS, now)
        return {"at": now, "events": [_entry(occurrence, language) for occurrence in news]}


def _entry(occurrence: Occurrence, language: str) -> dict[str, Any]:
    """What the script shows of an occurrence."""
    run = occurrence.run
    try:
        message = notice_of(occurrence, Policy(), language)
        title, text = message.title, message.text
    except Exception as error:  # whatever is in a file of that run: it has happened, and the others are shown
        title, text = run.title, say("notify-broken", language, what=type(error).__name__)
    id = f"{run.id}#{occurrence.key}"
    return {"id": id, "event": occurrence.event, "name": run.title, "title": title, "text": text, "run": run.id}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


async def _script(_request: Request) -> Response:
    return Response(SCRIPT, media_type="text/javascript", headers={"Cache-Control": "no-cache"})
