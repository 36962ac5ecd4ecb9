"""The page of one's own tokens, behind the name in the head: create one, see it once, revoke it. It needs no script."""

from __future__ import annotations

import time
from functools import partial
from html import escape
from http import HTTPStatus
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from engine.core import audit, tokens
from engine.core.problems import Refusal
from engine.core.rights import VIEWER
from webui.account_html import Content, Outcome, account_page
from webui.people import person_of
from webui.reader_language import language_of
from webui.words import Words

MAX_FORM_FIELDS = 16


def routes(users_file: Path, saves: Path, root: str) -> list[Route]:
    """`/tokens`, for whoever the login has let through."""
    page = partial(_answer, users_file, saves, root)
    return [Route("/tokens", page, methods=["GET", "POST"])]


async def _answer(users_file: Path, saves: Path, root: str, request: Request) -> Response:
    """The list, after what the form asks for has been done."""
    made = error = ""
    status = HTTPStatus.OK
    if request.method == "POST":
        async with request.form(max_files=0, max_fields=MAX_FORM_FIELDS, max_part_size=1024) as form:
            scopes = [str(scope) for scope in form.getlist("scope")]
            name, revoked = str(form.get("name", "")), str(form.get("revoke", ""))
        person = person_of(request)
        try:
            with audit.recorded(saves, person, "token-revoke" if revoked else "token-add", revoked or name):
                if revoked:
                    await run_in_threadpool(tokens.revoke_token, users_file, person.name, revoked)
                else:
                    made = await run_in_threadpool(tokens.add_token, users_file, person.name, name, scopes)
        except Refusal as refusal:
            error, status = refusal.text(language_of(request)), HTTPStatus.UNPROCESSABLE_ENTITY
    try:
        known = await run_in_threadpool(tokens.read_tokens, users_file, person_of(request).name)
    except Refusal as refusal:
        known, error, status = [], refusal.text(language_of(request)), HTTPStatus.UNPROCESSABLE_ENTITY
    return _page(request, root, known, made, error, status)


def _page(request: Request, root: str, known: list[tokens.Token], made: str, error: str, status: int) -> HTMLResponse:
    words = Words(language_of(request))
    offered = ("read",) if person_of(request).role == VIEWER else tokens.SCOPES
    labels = {scope: escape(words(f"token-scope-{scope}")) for scope in offered}
    scopes = "".join(
        f'<label><input type="checkbox" name="scope" value="{scope}" checked>{label}</label>'
        for scope, label in labels.items()
    )
    fields = (
        f'<label>{escape(words("token-name"))}<input name="name" maxlength="{tokens.MAX_NAME_LENGTH}" '
        f'autocomplete="off" spellcheck="false" required></label>'
        f"<fieldset><legend>{escape(words('token-scopes'))}</legend>{scopes}</fieldset>"
    )
    new = f"{escape(words('token-once'))}<code>{escape(made)}</code>" if made else ""
    lines = "".join(_line(token, words, root) for token in known[::-1])
    content = Content(
        "tokens", words("tokens"), words("tokens-help"), fields, words("token-create"), f"<ul>{lines}</ul>"
    )
    return account_page(content, words, root, Outcome(new, (error,), status))


def _line(token: tokens.Token, words: Words, root: str) -> str:
    used = words("token-used", day=_day(token.used)) if token.used else words("token-unused")
    scopes = ", ".join(words(f"token-scope-{scope}") for scope in token.scopes)
    about = f"{scopes} · {words('token-created', day=_day(token.created))} · {used}"
    return (
        f"<li><div>{escape(token.name)}<small>{escape(about)}</small></div>"
        f'<form method="post" action="{escape(root)}/tokens"><input type="hidden" name="revoke" value="{token.id}">'
        f"<button>{escape(words('token-revoke'))}</button></form></li>"
    )


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))
