"""The users of the studio: a file of names and password hashes, and the key that signs their sessions.

One line per user, `name:scrypt:n:r:p:salt:hash`, so that an operator can read and edit it. Sessions are handled by
`webui.sessions`; cookies, pages and rate limiting by `webui.login`.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.problems import NOTHING, Refusal, problem

USER_NAME = re.compile(r"\w[\w.@-]{0,63}")  # letters of any script; no colon, which separates the fields of the file
MIN_PASSWORD_LENGTH, MAX_PASSWORD_LENGTH = 8, 256  # length of a password in characters
SCRYPT_COST = (1 << 14, 8, 5)  # scrypt's n, r, p: 16 MiB and about 0.2 s, one of OWASP's equivalent choices


def read_users(path: Path) -> dict[str, str]:
    """Name → stored hash, in the order of the file; {} without a file. Invalid lines are skipped, so that a typo in one
    line locks out one user and not the whole team."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.strip().partition(":") for line in lines)
    return {name: stored for name, _, stored in pairs if USER_NAME.fullmatch(name) and stored.startswith("scrypt:")}


def add_user(path: Path, name: str, password: str) -> None:
    """Add a user, or set a new password, which ends the sessions with the old one. Raises Refusal for an invalid name
    or password."""
    problems = []
    if not USER_NAME.fullmatch(name):
        problems.append(problem("user-name", "name", given=name[:80]))
    if not MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH:
        problems.append(problem("user-password", "password", shortest=MIN_PASSWORD_LENGTH, longest=MAX_PASSWORD_LENGTH))
    if problems:
        raise Refusal(problems)
    stored = _hash(password, secrets.token_bytes(16), SCRYPT_COST)
    with _locked(path):
        _write(path, {**read_users(path), name: stored})


def remove_user(path: Path, name: str) -> None:
    """Remove a user; their sessions end immediately. Raises Refusal if there is no such user."""
    with _locked(path):
        known = read_users(path)
        if name not in known:
            raise Refusal(problem("user-missing", "name", given=name[:80], known=", ".join(known) or NOTHING))
        _write(path, {other: stored for other, stored in known.items() if other != name})


def check_password(path: Path, name: str, password: str) -> bool:
    """Whether the password is correct. Takes the same time for names that do not exist."""
    stored = read_users(path).get(name) or "scrypt:{}:{}:{}:{}:".format(
        *SCRYPT_COST, base64.b64encode(bytes(16)).decode()
    )
    try:
        _, n, r, p, salt, _ = stored.split(":")
        hashed = _hash(password[:MAX_PASSWORD_LENGTH], base64.b64decode(salt), (int(n), int(r), int(p)))
    except ValueError:  # the line has been edited
        return False
    return hmac.compare_digest(hashed.encode(), stored.encode())


def _hash(password: str, salt: bytes, cost: tuple[int, int, int]) -> str:
    n, r, p = cost
    # The same password typed on two systems may differ in the encoding of accents and full-width letters.
    text = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    hashed = hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=64 << 20)
    return f"scrypt:{n}:{r}:{p}:{base64.b64encode(salt).decode()}:{base64.b64encode(hashed).decode()}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Prevents concurrent changes of the file: two operators who add users at once must both succeed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, known: dict[str, str]) -> None:
    partial = _write_private(path, "".join(f"{name}:{stored}\n" for name, stored in known.items()))
    os.replace(partial, path)


def _write_private(path: Path, text: str) -> str:
    """A complete file next to `path`, readable by its owner only, to be moved into place."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp's mode is 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return partial


def signing_key(path: Path) -> bytes:
    """The key that signs sessions, created on first use. Deleting the file logs everybody out. Raises Refusal if the
    file does not contain a valid key."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _write_private(path, secrets.token_hex(32))
        try:
            os.link(partial, path)  # fails if another process was first, whose key is then used
        except FileExistsError:
            pass
        finally:
            os.unlink(partial)
    key = path.read_bytes().strip()
    if len(key) < 32:
        raise Refusal(problem("secret-broken", file=path))
    return key
