"""Who is using the page, and whether they may do what they ask for.

Every handler is also an HTTP endpoint, so what a button does not offer must be refused here, too. A handler that
changes something does so within `acting`, which asks `engine.core.rights` and records the outcome. `PageBlocks` notes
who has sent the request of each event, whatever the parameters of its handler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core import audit
from engine.core.problems import Problem
from engine.core.rights import OPERATOR, VIEWER, Person, may
from webui.body_limit import UPLOAD_PATH
from webui.reader_language import language_of

OUTSIDE_OF_REQUESTS = Person("", OPERATOR)  # as in a shell
_asking: ContextVar[Person] = ContextVar("asking", default=OUTSIDE_OF_REQUESTS)


def person_of(request: Any) -> Person:
    """The person who has sent a request of starlette or gradio, according to the login. Without a login, everybody is
    an operator; a name without a role, or no request at all, is a viewer's."""
    if request is None:
        return Person()
    name = getattr(request.state, "user", "") or ""
    role = getattr(request.state, "role", "") or (VIEWER if name else OPERATOR)
    client = getattr(request, "client", None)  # none on a socket without addresses
    return Person(name, role, client.host if client else "")


class UploadsOfUsers:
    """An ASGI middleware that takes no uploaded files from viewers, before they are on the disk."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http" and scope["path"].endswith(UPLOAD_PATH):
            connection = HTTPConnection(scope)
            if problem := may(person_of(connection), "upload"):
                answer = PlainTextResponse(problem.text(language_of(connection)), 403)
        await answer(scope, receive, send)


def note_person(request: Any) -> None:
    """To be called before the handler of an event, in its context."""
    _asking.set(person_of(request))


def asking() -> Person:
    """The person whose request is being handled."""
    return _asking.get()


def hindrance(action: str, owner: str | None = None) -> Problem | None:
    """Why the person who is asking may not do this; None if they may: see `rights.may`."""
    return may(asking(), action, owner)


def acting(saves: Path, action: str, what: str, owner: str | None = None) -> AbstractContextManager[None]:
    """Do an action to `what`, which belongs to `owner`, if the person who is asking may; record the outcome. Raises
    Refusal."""
    return audit.acting(saves, asking(), action, what, owner)
