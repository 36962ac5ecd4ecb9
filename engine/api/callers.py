"""Who calls: the user of a token, and what the token is for."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.api.errors import ApiError
from engine.core import audit, tokens
from engine.core.attempts import Attempts
from engine.core.problems import NOTHING, problem
from engine.core.rights import OPERATOR, VIEWER, Person, may
from engine.core.users import read_users

MAX_TURNS = 64  # answers that a caller waits for at once; half of those that there are


@dataclass(frozen=True)
class Caller:
    """A person, by one of their tokens. Without a login, everybody is an operator without a name, as on the page."""

    person: Person
    scopes: tuple[str, ...] = tokens.SCOPES

    @property
    def name(self) -> str:
        return self.person.name

    def require(self, *scopes: str) -> None:
        """Raises ApiError unless the token has one of these scopes."""
        if not set(scopes) & set(self.scopes):
            missing = problem("api-scope", missing=" / ".join(scopes), scopes=", ".join(self.scopes))
            raise ApiError(403, missing, code="insufficient_permissions")

    def sees(self, owner: str) -> bool:
        """Whether jobs, files and models of `owner` are there for the caller: their own, and everybody's for operators.
        The page shows them to all who are signed in; a program is to work with its user's."""
        return self.person.role == OPERATOR or (owner != "" and owner == self.name)

    def acting(
        self, saves: Path, action: str, what: str, owner: str | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Do an action to `what`, which belongs to `owner`, if the caller may; it is recorded in the audit. Raises
        Refusal."""
        return audit.acting(saves, self.person, action, what, owner)

    def ask_leave(self, saves: Path, action: str) -> None:
        """For what begins with much work, before it is known to what: only a refusal is recorded. Raises Refusal."""
        if may(self.person, action):
            with self.acting(saves, action, NOTHING):
                pass


@dataclass(frozen=True)
class Turns:
    """How many answers each caller waits for, at `most`: one program must not use up what is there for all. `reason` is
    the code of the sentence that refuses another. Everything happens on the event loop."""

    most: int = MAX_TURNS
    reason: str = "api-turns"
    taken: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def of(self, caller: Caller) -> Iterator[None]:
        """One more answer of a caller, without a login of an address. Raises ApiError if there are enough."""
        key = caller.name or caller.person.address
        if self.taken[key] >= self.most:
            raise ApiError(429, problem(self.reason, most=self.most), code="rate_limit_exceeded")
        self.taken[key] += 1
        try:
            yield
        finally:
            self.taken[key] -= 1
            if not self.taken[key]:
                del self.taken[key]


class Gate:
    """Reads the token of each request. Without a users file there is no login, and any key is accepted."""

    def __init__(self, users_file: Path | None):
        self.users_file = users_file
        self.attempts = Attempts()

    def caller(self, authorization: str, address: str) -> Caller:
        """Who sent this Authorization header. Raises ApiError for a wrong token: 401, or 429 if many came from the
        address. A right token never waits, since nobody guesses 256 bits."""
        if self.users_file is None:
            return Caller(Person("", OPERATOR, address))
        scheme, _, text = authorization.partition(" ")
        token = tokens.find_token(self.users_file, text.strip()) if scheme.lower() == "bearer" else None
        if token:
            user = read_users(self.users_file).get(token.user)
            with contextlib.suppress(OSError):  # a full disk keeps nobody out
                tokens.note_use(self.users_file, token)
            return Caller(Person(token.user, user.role if user else VIEWER, address), token.scopes)
        now = time.monotonic()
        if wait := self.attempts.wait(address, now):
            error = ApiError(429, problem("login-wait", seconds=wait), code="rate_limit_exceeded")
            error.headers["Retry-After"] = str(wait)
            raise error
        self.attempts.failed(address, now)
        raise ApiError(401, problem("api-token" if text else "api-no-token"), code="invalid_api_key")
