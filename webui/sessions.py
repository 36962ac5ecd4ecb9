"""Sessions of logged-in users: signed tokens that are valid for 30 days, until the password changes, or until the user
signs out.

itsdangerous signs and dates them. Sessions that ended early are recorded in a file, since a token cannot know this; so
a restarted studio knows them, and so does another one with the same users.
"""

from __future__ import annotations

import secrets
from functools import lru_cache
from pathlib import Path

from itsdangerous import BadData, Signer, URLSafeTimedSerializer

from engine.core.regular_files import read_bytes
from engine.core.rundir import append_lines, read_lines
from engine.core.users import User, read_users

SESSION_SECONDS = 30 * 24 * 3600


class Sessions:
    """Tokens of the users in `users_file`, signed with `key`. `ended_file` gets a line for each ended session; it is
    never shortened, since a line has 30 bytes and stands for a login."""

    def __init__(self, users_file: Path, key: bytes, ended_file: Path) -> None:
        self.users_file, self.key, self.ended_file = users_file, key, ended_file
        self.unwritten: set[str] = set()  # ended while the file could not be written
        self.serializer = URLSafeTimedSerializer(key, salt="session")

    def begin(self, name: str) -> str:
        """A token for this user. Raises KeyError for an unknown one."""
        user = read_users(self.users_file)[name]
        return self.serializer.dumps([name, self._mark(user), secrets.token_hex(8)])

    def user(self, token: str) -> str | None:
        """The user of a session; None if the token is forged, expired or ended, or the user was removed or has a new
        password."""
        session = self._read(token)
        return session[0] if session else None

    def end(self, token: str) -> None:
        """End the session for good, wherever its token may have been copied to, and whether or not its user exists at
        the moment. Raises OSError if that cannot be written: then it has ended only until this process does, unless
        another that ends can be written."""
        session = self._signed(token)
        if not session or session[2] in self._ended() - self.unwritten:
            return
        self.unwritten.add(session[2])
        append_lines(self.ended_file, [{"session": id} for id in self.unwritten])
        self.unwritten.clear()

    def _read(self, token: str) -> tuple[str, str] | None:
        """The user and the id of a valid session."""
        session = self._signed(token)
        if session is None:
            return None
        name, mark, id = session
        user = read_users(self.users_file).get(name)
        valid = user and mark == self._mark(user) and id not in self._ended()
        return (name, id) if valid else None

    def _signed(self, token: str) -> tuple[str, str, str] | None:
        """The name, the mark of the user and the id in a token that was made here within the last 30 days."""
        try:
            name, mark, id = self.serializer.loads(token, max_age=SESSION_SECONDS)
        except BadData:
            return None
        return name, mark, id

    def _mark(self, user: User) -> str:
        """A value that changes with the password, and with the user of this name, and reveals nothing about either."""
        stored = ":".join(filter(None, (user.hash, user.id)))
        return Signer(self.key, salt="password").get_signature(stored).decode()

    def _ended(self) -> frozenset[str]:
        try:
            status = self.ended_file.stat()
        except FileNotFoundError:
            return frozenset(self.unwritten)
        return _ids_in(self.ended_file, status.st_mtime_ns, status.st_size) | self.unwritten


@lru_cache(maxsize=4)
def _ids_in(file: Path, mtime_ns: int, size: int) -> frozenset[str]:
    read_bytes(file)  # raises OSError if it cannot be read: ended sessions must not become valid
    return frozenset(id for line in read_lines(file) if isinstance(id := line.get("session"), str))
