"""Tokens with which users' programs sign in: a file beside the users file, with the hash of each.

A token has 256 random bits, so a plain hash cannot be reversed; it is shown once, when it is made. It belongs to a
user and ends with them, also if another is added under the same name. `engine.api.callers` asks for one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import NOTHING, Refusal, problem
from engine.core.rundir import read_to_change, write_text
from engine.core.users import User, read_users

SCOPES = ("fine-tune", "chat", "read")  # files and jobs; models and answers; files and jobs, without changing them
PREFIX = "sk-athanor-"
MAX_TOKENS_PER_USER = 50
MAX_NAME_LENGTH = 64
NOTED_EVERY_SECONDS = 60.0  # so that a busy program does not rewrite the file with every request
_TOKEN = re.compile(rf"{PREFIX}([0-9a-f]{{12}})-[\w-]{{43}}", re.ASCII)


@dataclass(frozen=True)
class Token:
    """What the file says of a token. Times are seconds since the epoch; `used` is None before its first use."""

    id: str
    user: str
    name: str
    scopes: tuple[str, ...]
    hash: str
    created: float
    used: float | None = None
    user_id: str = ""  # as in the users file; "" of a user whose line has none


def tokens_file(users_file: Path) -> Path:
    """Where the tokens of these users are."""
    return users_file.with_suffix(".tokens.json")


def read_tokens(users_file: Path, user: str | None = None) -> list[Token]:
    """The tokens of all users that exist, or of one, oldest first. Entries that cannot be read are left out. Raises
    Refusal if the file cannot be read."""
    users = read_users(users_file)
    tokens = [token for token in _read(tokens_file(users_file)) if _works(token, users)]
    return [token for token in tokens if user is None or token.user == user]


def _works(token: Token, users: Mapping[str, User]) -> bool:
    """Whether the token's user still exists, and is not another of the same name."""
    return token.user in users and token.user_id == users[token.user].id


def add_token(users_file: Path, user: str, name: str, scopes: Sequence[str] = SCOPES) -> str:
    """Make a token and return it; it is not stored, only its hash. Raises Refusal for an unknown user or scope, or a
    name that is invalid or taken."""
    if user not in (users := read_users(users_file)):
        raise Refusal(problem("user-missing", "user", given=user[:80], known=", ".join(users) or NOTHING))
    name = name.strip()
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise Refusal(problem("token-name", "name", given=name[:MAX_NAME_LENGTH] or NOTHING, longest=MAX_NAME_LENGTH))
    if unknown := [scope for scope in scopes if scope not in SCOPES] or ([] if scopes else [NOTHING]):
        raise Refusal(problem("token-scope", "scopes", given=unknown[0][:80], known=", ".join(SCOPES)))
    id = secrets.token_hex(6)
    text = f"{PREFIX}{id}-{secrets.token_urlsafe(32)}"
    ordered = tuple(scope for scope in SCOPES if scope in scopes)
    made = Token(id, user, name, ordered, _hash(text), time.time(), user_id=users[user].id)

    def add(tokens: list[Token]) -> list[Token]:
        tokens = [token for token in tokens if token.user != user or _works(token, users)]
        own = [token for token in tokens if token.user == user]
        if any(token.name == name for token in own):
            raise Refusal(problem("token-name-taken", "name", given=name))
        if len(own) >= MAX_TOKENS_PER_USER:
            raise Refusal(problem("token-too-many", most=MAX_TOKENS_PER_USER))
        return [*tokens, made]

    _change(users_file, add)
    return text


def revoke_token(users_file: Path, user: str, name: str) -> None:
    """End a user's token with this name or id; its next request is refused. Raises Refusal if there is none."""

    def without(tokens: list[Token]) -> list[Token]:
        kept = [token for token in tokens if token.user != user or name not in (token.name, token.id)]
        if len(kept) == len(tokens):
            known = ", ".join(token.name for token in tokens if token.user == user) or NOTHING
            raise Refusal(problem("token-missing", "name", given=name[:80], known=known))
        return kept

    _change(users_file, without)


def revoke_tokens(users_file: Path, user: str) -> int:
    """End all tokens of a user, who may have been removed; how many there were. Raises Refusal if the file cannot be
    read."""
    revoked = 0

    def without(tokens: list[Token]) -> list[Token]:
        nonlocal revoked
        kept = [token for token in tokens if token.user != user]
        revoked = len(tokens) - len(kept)
        return kept

    if os.path.lexists(tokens_file(users_file)):
        _change(users_file, without)
    return revoked


def find_token(users_file: Path, text: str) -> Token | None:
    """The token that this text is; None if it was never made, was revoked, or its user was removed."""
    match = _TOKEN.fullmatch(text)
    for token in read_tokens(users_file) if match else ():
        if match and token.id == match[1] and hmac.compare_digest(token.hash, _hash(text)):
            return token
    return None


def note_use(users_file: Path, token: Token) -> None:
    """Record that the token has just been used, at most once a minute."""
    now = time.time()
    if token.used is None or now - token.used >= NOTED_EVERY_SECONDS:
        _change(
            users_file,
            lambda tokens: [replace(other, used=now) if other.id == token.id else other for other in tokens],
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> list[Token]:
    return _tokens(read_to_change(path, []))


def _tokens(entries: list[Any]) -> list[Token]:
    return [token for entry in entries if (token := _token(entry))]


def _token(entry: Any) -> Token | None:
    try:
        token = Token(**entry | {"scopes": tuple(entry["scopes"])})
    except (TypeError, KeyError, AttributeError):
        return None
    texts = (token.id, token.user, token.name, token.hash, token.user_id, *token.scopes)
    return token if all(isinstance(text, str) for text in texts) else None


def _change(users_file: Path, change: Callable[[list[Token]], list[Token]]) -> None:
    """Replace the tokens by what `change` makes of them, one process at a time. Entries that this version cannot read
    stay. Raises Refusal if the file cannot be read."""
    path = tokens_file(users_file)
    lock = wait_for_lock(path.with_name(f".{path.name}.lock"))
    try:
        entries: list[Any] = read_to_change(path, [])
        tokens = [asdict(token) for token in change(_tokens(entries))]
        unknown = [entry for entry in entries if not _token(entry)]
        text = json.dumps([*unknown, *tokens], ensure_ascii=False, indent=1)
        write_text(path, text + "\n", private=True)
    finally:
        os.close(lock)
