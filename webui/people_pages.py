"""The page on which operators add, change and remove users, and set quotas. It needs no script."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from engine.core import audit, tokens, users
from engine.core.problems import NOTHING, Problem, Refusal, problem, say
from engine.core.rights import ROLES, Person, may
from engine.launch.workspace import Workplace
from engine.runs import accounts, quotas
from engine.runs.quotas import NAMES
from webui.account_html import Outcome, account_page
from webui.people import person_of
from webui.people_html import PATH, Typed, content
from webui.reader_language import language_of
from webui.words import LANGUAGES, Words

MAX_FORM_FIELDS, MAX_FIELD_BYTES = 16, 2048
Form = Mapping[str, str]


class PeoplePages:
    """`/people`, for operators."""

    def __init__(self, workplace: Workplace, users_file: Path, root: str):
        self.workplace, self.users_file, self.root = workplace, users_file, root

    def routes(self) -> list[Route]:
        return [Route(f"/{PATH}", self.answer, methods=["GET", "POST"])]

    async def answer(self, request: Request) -> Response:
        """The page, after what a form of it asks for has been done."""
        person, language = person_of(request), language_of(request)
        if denied := may(person, "see-users"):
            return PlainTextResponse(denied.text(language), HTTPStatus.FORBIDDEN)
        form: Form = {}
        if request.method == "POST":
            limits: dict[str, Any] = {"max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_FIELD_BYTES}
            async with request.form(max_files=0, **limits) as fields:
                form = {name: str(value) for name, value in fields.items()}
        return await run_in_threadpool(self._page, form, person, Words(language))

    def _page(self, form: Form, person: Person, words: Words) -> Response:
        done, problems, typed, failure = "", list[Problem](), Typed(), HTTPStatus.UNPROCESSABLE_ENTITY
        if form:
            try:
                done = self._act(form, person, words.language)
            except Refusal as refusal:
                problems = refusal.problems
            except OSError as error:  # for example a full disk
                place = error.filename or self.users_file.parent
                problems = [problem("system-refused", file=place, why=error.strerror or error)]
                failure = HTTPStatus.INSUFFICIENT_STORAGE
            if problems:
                typed = _typed(form, problems)
        everybody: list[accounts.Account] = []
        limits: quotas.Quotas | None = None
        try:
            everybody = accounts.accounts(self.workplace, self.users_file)
            limits = quotas.read_quotas(self.workplace.saves)
        except Refusal as refusal:
            problems += [unreadable for unreadable in refusal.problems if unreadable not in problems]
        status = failure if problems else HTTPStatus.OK
        errors = tuple(issue.text(words.language) for issue in problems)
        page = content(everybody, limits, typed, self.root, words)
        return account_page(page, words, self.root, Outcome(escape(done), errors, status))

    def _act(self, form: Form, person: Person, language: str) -> str:
        """Do what a form asks for, and say what was done. Raises Refusal, and OSError."""
        actions = {
            "add": ("user-add", self._add),
            "role": ("user-role", self._set_role),
            "password": ("user-password", self._set_password),
            "limits": ("user-quota", self._set_limits),
            "remove": ("user-remove", self._remove),
        }
        if (name := form.get("do", "")) not in actions:
            raise Refusal(problem("people-action", given=name[:80] or NOTHING))
        action, act = actions[name]
        user = form.get("user", "").strip()
        what = f"{user} {form.get('role', '')}" if act in (self._add, self._set_role) else user
        with audit.acting(self.workplace.saves, person, action, what.strip()):
            return act(form, user, language)

    def _add(self, form: Form, user: str, language: str) -> str:
        if user in users.read_users(self.users_file):
            raise Refusal(problem("user-exists", name=user))
        password = form.get("password", "") or None
        users.add_user(self.users_file, user, password, form.get("role", ""), "take-over" in form)
        return say("user-added", language, name=user, role=_role(users.read_users(self.users_file)[user].role))

    def _set_role(self, form: Form, user: str, language: str) -> str:
        role = form.get("role", "")
        users.set_role(self.users_file, user, role, keep_operator=True)
        return say("user-role-set", language, name=user, role=_role(role))

    def _set_password(self, form: Form, user: str, language: str) -> str:
        users.set_password(self.users_file, user, form.get("password", ""))
        if "revoke" in form:
            tokens.revoke_tokens(self.users_file, user)
        left = ", ".join(token.name for token in tokens.read_tokens(self.users_file, user))
        return say("user-password-set", language, name=user, names=left or NOTHING)

    def _set_limits(self, form: Form, user: str, language: str) -> str:
        if user and not users.USER_NAME.fullmatch(user):
            raise Refusal(problem("user-name", "name", given=user[:80]))
        own = {name: _limit(form[name]) for name in NAMES if form.get(name, "").strip()}
        quotas.change_limits(self.workplace.saves, user, own)
        return say("quota-set", language, name=user) if user else say("quota-default-set", language)

    def _remove(self, form: Form, user: str, language: str) -> str:
        accounts.remove(self.workplace, self.users_file, user, keep_operator=True)
        return say("user-gone", language, name=user)


def _limit(text: str) -> float | None:
    """A limit as it was typed. Raises Refusal."""
    text = text.strip()
    if text.casefold() in {Words(language)("quota-none").casefold() for language in LANGUAGES}:
        return None
    number = math.nan
    with contextlib.suppress(ValueError):
        number = float(text)
    if not 0 <= number < math.inf:
        raise Refusal(problem("quota-number", given=text[:80]))
    return int(number) if number.is_integer() else number


def _role(role: str) -> dict[str, str]:
    return {language: Words(language)(f"role-of-{role}") for language in LANGUAGES}


def _typed(form: Form, problems: list[Problem]) -> Typed:
    """What stays in the form for a new user."""
    if form.get("do") != "add":
        return Typed()
    role = form.get("role", "")
    removed = any(issue.code == "user-removed" for issue in problems)
    return Typed(form.get("user", ""), role if role in ROLES else Typed.role, removed)
