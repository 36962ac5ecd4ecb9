"""Sessions end when they should, and hold until then: whoever restarts the
studio, and whatever a request says of itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from itsdangerous import Signer

from engine.core import users
from engine.core.attempts import FREE_TRIES
from engine.launch.workspace import Workplace
from tests.conftest import start_studio
from tests.no_space import no_space
from webui.sessions import Sessions

pytestmark = pytest.mark.usefixtures("forked")

KEY = b"k" * 32
DAY = 24 * 3600  # seconds


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A users file with two users in it, hashed cheaply."""
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    for name in ("李雷", "han"):
        users.add_user(tmp_path / "users", name, "correct horse")
    return tmp_path / "users"


@pytest.fixture
def sessions(file: Path) -> Sessions:
    return Sessions(file, KEY, file.with_name("ended"))


@pytest.mark.parametrize(("age", "name"), [(30 * DAY - 60, "李雷"), (30 * DAY + 60, None)])
def test_a_session_lasts_thirty_days(sessions, monkeypatch, age, name):
    token, now = sessions.begin("李雷"), time.time()
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: now + age)
    assert sessions.user(token) == name


def test_a_new_password_ends_the_sessions_of_the_old_one(sessions, file):
    token, other = sessions.begin("李雷"), sessions.begin("han")
    users.add_user(file, "李雷", "another horse")
    assert sessions.user(token) is None
    assert sessions.user(other) == "han"


def test_a_removed_users_session_ends(sessions, file):
    token = sessions.begin("李雷")
    users.remove_user(file, "李雷")
    assert sessions.user(token) is None
    with pytest.raises(KeyError):
        sessions.begin("李雷")


def test_the_sessions_of_a_removed_user_are_not_those_of_another_with_the_name(sessions, file):
    users.add_user(file, "eve", None)
    token = sessions.begin("eve")
    users.set_role(file, "eve", "viewer")
    assert sessions.user(token) == "eve"
    users.remove_user(file, "eve")
    users.add_user(file, "eve", None, take_over=True)
    assert sessions.user(token) is None


def test_a_session_that_was_left_never_works_again(sessions: Sessions, file: Path) -> None:
    """Also if its user was gone at that moment, and is back as a backup of the file had them."""
    users.add_user(file, "eve", None, "user")  # as of an OpenID provider
    token, text = sessions.begin("eve"), file.read_text()
    users.remove_user(file, "eve")
    sessions.end(token)
    file.write_text(text)
    assert sessions.user(sessions.begin("eve")) == "eve"
    for studio in (sessions, Sessions(file, KEY, sessions.ended_file)):
        assert studio.user(token) is None


def test_signing_out_on_a_full_disk_is_kept_in_mind_and_written_later(sessions: Sessions, file: Path) -> None:
    first, second = sessions.begin("han"), sessions.begin("han")
    with no_space(), pytest.raises(OSError, match="too large"):
        sessions.end(first)
    assert (sessions.user(first), sessions.user(second)) == (None, "han")
    sessions.end(second)
    later = Sessions(file, KEY, sessions.ended_file)
    assert (later.user(first), later.user(second)) == (None, None)


def test_a_session_from_before_users_had_ids_goes_on(sessions, file):
    file.write_text(re.sub(":[0-9a-f]{16}$", "", file.read_text(), flags=re.MULTILINE))
    stored = users.read_users(file)["han"].hash
    mark = Signer(KEY, salt="password").get_signature(stored).decode()  # as it was made then
    assert sessions.user(sessions.serializer.dumps(["han", mark, "1"])) == "han"


def test_signing_out_ends_one_session_everywhere(sessions, file):
    here, there = sessions.begin("李雷"), sessions.begin("李雷")
    sessions.end(here)
    sessions.end(here)
    sessions.end("forged")
    later = Sessions(file, KEY, file.with_name("ended"))  # a studio that was started again
    for studio in (sessions, later):
        assert studio.user(here) is None
        assert studio.user(there) == "李雷"
    assert len(file.with_name("ended").read_text().splitlines()) == 1
    later.end(there)
    assert sessions.user(there) is None


def test_a_token_cannot_be_forged_or_changed(sessions, file):
    token, other = sessions.begin("李雷"), sessions.begin("han")
    payload, stamp, signature = token.split(".")
    changed = [
        f"{payload[:at]}{'A' if payload[at] != 'A' else 'B'}{payload[at + 1 :]}.{stamp}.{signature}"
        for at in (0, 5, 20)
    ]
    exchanged = [
        f"{other.split('.')[0]}.{stamp}.{signature}",
        f"{payload}.{other.split('.')[1]}x.{signature}",
    ]
    old = "5p2O6Zu3.1800000000.5f2c"  # as they were before
    for bad in [
        *changed,
        *exchanged,
        old,
        payload,
        f"{payload}.{stamp}.",
        token + "0",
        "",
        "..",
        "é.1.x",
        "%%.9.x",
    ]:
        assert sessions.user(bad) is None, bad
    assert Sessions(file, b"K" * 32, file.with_name("ended")).user(token) is None
    assert sessions.user(token) == "李雷"


# --------------------------------------------------------------------------------------- by real requests

Start = Callable[..., httpx.Client]


@pytest.fixture
def start(tmp_path: Path, file: Path) -> Iterator[Start]:
    """Starts the studio with these users, ending the one before; returns a client of it."""
    running = []

    def stop() -> None:
        while running:
            process = running.pop()
            process.terminate()
            process.wait()

    def begin(*flags: str) -> httpx.Client:
        stop()
        place = Workplace(models=(tmp_path / "models",), data=tmp_path / "data", saves=tmp_path / "saves")
        process, address = start_studio(place, "--auth", str(file), *flags)
        running.append(process)
        return httpx.Client(base_url=address, trust_env=False, timeout=60)

    yield begin
    stop()


def log_in(client: httpx.Client, password: str, address: str = "") -> int:
    headers = {"X-Forwarded-For": address} if address else {}
    return client.post("/login", data={"name": "han", "password": password}, headers=headers).status_code


def tries_until_refused(client: httpx.Client, address: str) -> list[int]:
    """The statuses of wrong passwords from ever other addresses, up to the first that is to wait. On a busy machine the
    first waits, of a second or two, may be over before the next try."""
    tries: list[int] = []
    while 429 not in tries and len(tries) < FREE_TRIES + 7:
        tries.append(log_in(client, "wrong", address.format(len(tries))))
    return tries


def session_of(client: httpx.Client) -> dict[str, str]:
    """The header that carries a new session."""
    assert log_in(client, "correct horse") == 303
    header = {"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}
    client.cookies.clear()
    return header


@pytest.mark.slow
def test_who_signed_out_stays_out_and_who_did_not_stays_in_when_the_studio_restarts(start: Start) -> None:
    client = start()
    left, stayed = session_of(client), session_of(client)

    def status(session: dict[str, str]) -> int:
        return client.get("/api/nothing", headers=session).status_code

    assert (status(left), status(stayed), status({})) == (404, 404, 401)
    assert client.post("/logout", headers=left).status_code == 303
    assert (status(left), status(stayed)) == (401, 404)
    client = start()
    assert (status(left), status(stayed)) == (401, 404)


@pytest.mark.slow
def test_nobody_guesses_faster_by_saying_to_be_somebody_else(start: Start) -> None:
    client = start()
    tries = tries_until_refused(client, "10.0.0.{}")
    assert (tries[:FREE_TRIES], tries[-1]) == ([401] * FREE_TRIES, 429)
    client = start("--trusted-proxy", "127.0.0.1")
    tries = [log_in(client, "wrong", f"10.0.0.{number}") for number in range(FREE_TRIES + 1)]
    assert tries == [401] * (FREE_TRIES + 1)
    tries = tries_until_refused(client, "10.9.9.{}, 10.0.1.1")  # what the proxy has added counts
    assert (tries[:FREE_TRIES], tries[-1]) == ([401] * FREE_TRIES, 429)
