"""Who calls: the user of a token, and what the token is for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from engine.api.errors import ApiError
from engine.core import tokens
from engine.core.attempts import Attempts
from engine.core.problems import problem


@dataclass(frozen=True)
class Caller:
    """`name` is "" without a login, when everybody may see everything."""

    name: str
    scopes: tuple[str, ...] = tokens.SCOPES

    def require(self, *scopes: str) -> None:
        """Raises ApiError unless the token has one of these scopes."""
        if not set(scopes) & set(self.scopes):
            missing = problem("api-scope", missing=" / ".join(scopes), scopes=", ".join(self.scopes))
            raise ApiError(403, missing, code="insufficient_permissions")

    def owns(self, owner: str) -> bool:
        """Whether what belongs to `owner` may be seen and changed."""
        return not self.name or owner == self.name


class Gate:
    """Reads the token of each request. Without a users file there is no login, and any key is accepted."""

    def __init__(self, users_file: Path | None):
        self.users_file = users_file
        self.attempts = Attempts()

    def caller(self, authorization: str, address: str) -> Caller:
        """Who sent this Authorization header. Raises ApiError for a wrong token: 401, or 429 if many came from the
        address. A right token never waits, since nobody guesses 256 bits."""
        if self.users_file is None:
            return Caller("")
        scheme, _, text = authorization.partition(" ")
        token = tokens.find_token(self.users_file, text.strip()) if scheme.lower() == "bearer" else None
        if token:
            tokens.note_use(self.users_file, token)
            return Caller(token.user, token.scopes)
        now = time.monotonic()
        if wait := self.attempts.wait(address, now):
            error = ApiError(429, problem("login-wait", seconds=wait), code="rate_limit_exceeded")
            error.headers["Retry-After"] = str(wait)
            raise error
        self.attempts.failed(address, now)
        raise ApiError(401, problem("api-token" if text else "api-no-token"), code="invalid_api_key")
