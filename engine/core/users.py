"""The users of the studio: a file of names, password hashes and roles, and the key that signs their sessions.

One line per user, `name:scrypt:n:r:p:salt:hash:role:id`, so that an operator can read and edit it. A line without a
role is from a version that had none, in which everybody could do everything: an operator's. `name:external:role:id` is
a user without a password, who signs in through a reverse proxy or an OpenID provider. The id is drawn when the user is
added: sessions and tokens belong to it, so those of a user who was removed do not become those of another with the same
name. Lines of older versions have none. Runs, data and presets belong to the name, also after its user has gone: so
`name:removed:day` stays, and the name is given to nobody else unless an operator says that it is the same person. What
roles may do is in `engine.core.rights`. Sessions are handled by `webui.sessions`; cookies, pages and rate limiting by
`webui.login`.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.rights import OPERATOR, ROLES, USER
from engine.core.rundir import write_text

USER_NAME = re.compile(r"\w[\w.@-]{0,63}")  # letters of any script; no colon, which separates the fields of the file
MIN_PASSWORD_LENGTH, MAX_PASSWORD_LENGTH = 8, 256  # length of a password in characters
EXTERNAL = "external"  # in place of a hash
REMOVED = "removed"  # likewise, in the line that a removed user leaves
HASH_FIELDS = 6  # scrypt:n:r:p:salt:hash
USER_ID = re.compile(r"[0-9a-f]{16}")
SCRYPT_COST = (1 << 14, 8, 5)  # scrypt's n, r, p: 16 MiB and about 0.2 s, one of OWASP's equivalent choices


@dataclass(frozen=True)
class User:
    """A line of the file without its name. `written_role` is "" in a line from a version without roles, `id` in one
    from a version without ids."""

    hash: str
    written_role: str = ""
    id: str = ""

    @property
    def role(self) -> str:
        return self.written_role or OPERATOR

    @property
    def line(self) -> str:
        return ":".join(filter(None, (self.hash, self.written_role, self.id)))


def read_users(path: Path) -> dict[str, User]:
    """The users by name, in the order of the file; {} without a file. Invalid lines are skipped, so that a typo in one
    line, also in its role, locks out one user and not the whole team."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.strip().partition(":") for line in lines)
    users = ((name, _user(stored)) for name, _, stored in pairs if USER_NAME.fullmatch(name))
    return {name: user for name, user in users if user}


def _user(stored: str) -> User | None:
    fields = stored.split(":")
    size = 1 if fields[0] == EXTERNAL else HASH_FIELDS
    hash, rest = ":".join(fields[:size]), fields[size:]
    if fields[0] == "scrypt" and not rest:
        return User(hash)
    right = len(rest) in (1, 2) and rest[0] in ROLES and all(map(USER_ID.fullmatch, rest[1:]))
    return User(hash, *rest) if right and fields[0] in ("scrypt", EXTERNAL) else None


def removed_users(path: Path) -> dict[str, str]:
    """The names whose users were removed, and the day of it ("2026-11-30"); {} without a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    fields = (line.strip().split(":") for line in lines)
    return {line[0]: line[2] for line in fields if len(line) == 3 and line[1] == REMOVED}


def add_user(path: Path, name: str, password: str | None, role: str = "", take_over: bool = False) -> None:
    """Add a user, or set a new password, which ends the sessions with the old one, but no tokens; None for a user who
    signs in through a reverse proxy or an OpenID provider. Without `role`, a known user keeps theirs, the first in a
    file is an operator, and every other a user. What belongs to a removed user of this name becomes theirs, so that
    needs `take_over`. Raises Refusal without it, or for an invalid name, password or role."""
    problems = []
    if not USER_NAME.fullmatch(name):
        problems.append(problem("user-name", "name", given=name[:80]))
    problems += [] if password is None else _password_problems(password)
    if role and role not in ROLES:
        problems.append(_unknown_role(role))
    if problems:
        raise Refusal(problems)
    stored = EXTERNAL if password is None else _new_hash(password)
    with _locked(path):
        if not take_over and (day := removed_users(path).get(name)):
            raise Refusal(problem("user-removed", "name", name=name, day=day))
        known = read_users(path)
        before = known.get(name, User("", USER if known else OPERATOR, secrets.token_hex(8)))
        # A line without a password has to name its role.
        written_role = role or before.written_role or (OPERATOR if password is None else "")
        _replace_line(path, name, f"{name}:{User(stored, written_role, before.id).line}")


def set_role(path: Path, name: str, role: str, keep_operator: bool = False) -> None:
    """Give a user another role, from their next request on. Raises Refusal for an unknown user or role; with
    `keep_operator`, also if nobody would be an operator any more."""
    if role not in ROLES:
        raise Refusal(_unknown_role(role))
    with _locked(path):
        user = _known(path, name)
        if keep_operator and role != OPERATOR:
            _refuse_last_operator(path, name)
        _replace_line(path, name, f"{name}:{replace(user, written_role=role).line}")


def set_password(path: Path, name: str, password: str) -> None:
    """Give a user another password, which ends the sessions with the old one. Raises Refusal for an unknown user, or an
    invalid password."""
    if problems := _password_problems(password):
        raise Refusal(problems)
    stored = _new_hash(password)
    with _locked(path):
        _replace_line(path, name, f"{name}:{replace(_known(path, name), hash=stored).line}")


def remove_user(path: Path, name: str, keep_operator: bool = False) -> None:
    """Remove a user; their sessions end immediately. Raises Refusal if there is no such user; with `keep_operator`,
    also if nobody would be an operator any more."""
    with _locked(path):
        check_removable(path, name, keep_operator)
        _replace_line(path, name, f"{name}:{REMOVED}:{time.strftime('%Y-%m-%d')}")


def check_removable(path: Path, name: str, keep_operator: bool = False) -> None:
    """Raises Refusal where `remove_user` would."""
    _known(path, name)
    if keep_operator:
        _refuse_last_operator(path, name)


def _refuse_last_operator(path: Path, name: str) -> None:
    if not any(user.role == OPERATOR for other, user in read_users(path).items() if other != name):
        raise Refusal(problem("user-last-operator", "name", name=name))


def _password_problems(password: str) -> list[Problem]:
    if MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH:
        return []
    return [problem("user-password", "password", shortest=MIN_PASSWORD_LENGTH, longest=MAX_PASSWORD_LENGTH)]


def _new_hash(password: str) -> str:
    return _hash(password, secrets.token_bytes(16), SCRYPT_COST)


def _known(path: Path, name: str) -> User:
    users = read_users(path)
    if name not in users:
        raise Refusal(problem("user-missing", "name", given=name[:80], known=", ".join(users) or NOTHING))
    return users[name]


def _unknown_role(role: str) -> Problem:
    return problem("user-role", "role", given=role[:80], roles=", ".join(ROLES))


def remark_without_role(path: Path) -> Problem | None:
    """Says which users are operators only because their line is from a version without roles; None without any."""
    names = [name for name, user in read_users(path).items() if not user.written_role]
    return problem("users-without-role", count=len(names), file=path, names=", ".join(names)) if names else None


def check_password(path: Path, name: str, password: str) -> bool:
    """Whether the password is correct. Takes the same time for names that do not exist."""
    user = read_users(path).get(name)
    nobody = "scrypt:{}:{}:{}:{}:".format(*SCRYPT_COST, base64.b64encode(bytes(16)).decode())
    stored = user.hash if user and user.hash != EXTERNAL else nobody
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


def _replace_line(path: Path, name: str, written: str) -> None:
    """Write the line of a name. Every other line stays as it is: comments, and lines with a typo, too."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    places = [at for at, line in enumerate(lines) if line.strip().partition(":")[0] == name]
    at = places[0] if places else len(lines)
    others = [line for place, line in enumerate(lines) if place not in places]
    text = "".join(f"{line}\n" for line in [*others[:at], written, *others[at:]])
    write_text(path, text, private=True)


def signing_key(path: Path) -> bytes:
    """The key that signs sessions, created on first use. Deleting the file logs everybody out. Raises Refusal if the
    file does not contain a valid key."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_text(partial, secrets.token_hex(32), private=True)
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
