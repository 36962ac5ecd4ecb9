"""The door of the studio: who gets through, who is sent to the login page, who is slowed down."""

import errno
import html
import os
import re
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from engine.core import audit, users
from engine.core.attempts import FREE_TRIES, MAX_ADDRESSES, Attempts
from engine.core.problems import Refusal
from webui.login import LoginRequired
from webui.proxy_sign_in import ProxySignIn, loopback_warning

HTML = {"Accept": "text/html,*/*", "Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8"}
RIGHT = {"name": "han", "password": "correct horse"}


async def who(request):
    return PlainTextResponse(request.state.user)


async def role(request):
    return PlainTextResponse(request.state.role)


async def socket(websocket):
    await websocket.accept()
    await websocket.send_text(websocket.state.user)
    await websocket.close()


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """Makes a client of a studio with one user; `root_path` as an operator would give it."""
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    users.add_user(tmp_path / "users", "han", "correct horse")
    inner = Starlette(
        routes=[
            Route("/", who),
            Route("/api", who, methods=["GET", "POST"]),
            Route("/role", role),
            WebSocketRoute("/ws", socket),
            Route("/studio/", who),
        ]
    )

    def client(root_path="", base_url="http://studio.lan:7860", saves=None):
        app = LoginRequired(inner, tmp_path / "users", tmp_path / "secret", tmp_path / "ended", root_path, saves)
        return TestClient(app, base_url=base_url, follow_redirects=False)

    return client


def test_a_stranger_with_a_browser_is_shown_the_login_page(studio):
    client = studio()
    answer = client.get("/", headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    page = client.get("/login", headers=HTML)
    assert "丹炉" in page.text
    assert "密码" in page.text
    assert "Password" in client.get("/login", headers={"Accept-Language": "de, en;q=0.5"}).text


def test_after_login_one_is_where_one_wanted_to_be(studio):
    for root in ("", "/studio"):
        client = studio(root)
        sent = client.get(f"{root}/?run=tiny/lora/中文&tab=runs", headers=HTML).headers["location"]
        assert sent.startswith(f"{root}/login?next=")
        page = client.get(sent, headers=HTML).text
        wanted = html.unescape(re.search(r'name="next" value="([^"]*)"', page)[1])
        wrong = client.post(f"{root}/login", data={"name": "han", "password": "x", "next": wanted}).text
        assert f'value="{html.escape(wanted)}"' in wrong  # a slip of the pen does not lose it
        answer = client.post(f"{root}/login", data=RIGHT | {"next": wanted})
        there = urlsplit(answer.headers["location"])
        assert (there.netloc, there.path) == ("", f"{root}/")
        assert parse_qs(there.query) == {"run": ["tiny/lora/中文"], "tab": ["runs"]}
        assert client.get(sent).headers["location"] == answer.headers["location"]  # logged in already


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/a\\..\\",
        "javascript:alert(1)",
        "/\nSet-Cookie: a=b",
        "/\t/evil.example",
        " //evil.example",
        "",
        "/" + "x" * 5000,
        "@evil.example",
        ".evil.example",
    ],
)
def test_no_link_makes_the_login_lead_to_another_site(studio, elsewhere):
    client = studio()
    answer = client.post("/login", data=RIGHT | {"next": elsewhere})
    assert answer.headers["location"] == "/"
    assert client.get("/login", params={"next": elsewhere}).headers["location"] == "/"


def test_the_page_asks_nobody_outside(studio):
    page = studio().get("/login").text
    assert "http" not in page.replace("http%3A//www.w3.org/2000/svg", "")
    assert "<script" not in page


def test_a_stranger_gets_nothing_else(studio):
    client = studio()
    assert client.get("/api").status_code == 401
    assert client.post("/api", headers=HTML).status_code == 401
    assert client.get("/api", headers={"X-User": "han", "Cookie": "user=han"}).status_code == 401
    assert client.get("//login").status_code == 401
    assert client.get("/login/../api").status_code == 401
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws"):
        pass


def test_the_health_check_is_open(studio):
    answer = studio().get("/healthz")
    assert (answer.status_code, answer.text) == (200, "ok")


def test_a_user_comes_in_and_goes_out(studio):
    client = studio()
    answer = client.post("/login", data=RIGHT)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert client.get("/", headers=HTML).text == "han"
    assert client.post("/api").text == "han"
    assert client.get("/login").status_code == 303  # nothing to do here any more
    with client.websocket_connect("ws://studio.lan:7860/ws") as websocket:
        assert websocket.receive_text() == "han"
    assert client.get("/logout").status_code == 405  # a link in somebody's page must not log anybody out
    assert client.post("/logout").headers["location"] == "/login"
    assert client.get("/api").status_code == 401


def test_a_changed_password_logs_out(studio, tmp_path):
    client = studio()
    client.post("/login", data=RIGHT)
    users.add_user(tmp_path / "users", "han", "another horse")
    assert client.get("/api").status_code == 401


def test_the_cookie_follows_the_scheme(studio):
    plain = studio().post("/login", data=RIGHT).headers["set-cookie"]
    assert "Secure" not in plain
    assert "HttpOnly" in plain
    assert "SameSite=lax" in plain
    assert "Secure" in studio(base_url="https://studio.lan").post("/login", data=RIGHT).headers["set-cookie"]
    behind = studio().post("/login", data=RIGHT, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in behind.headers["set-cookie"]


def test_a_wrong_password_is_said_without_saying_who_exists(studio):
    client = studio()
    wrong = client.post("/login", data={"name": "han", "password": "x"}, headers=HTML)
    unknown = client.post("/login", data={"name": "nobody", "password": "x"}, headers=HTML)
    assert (wrong.status_code, unknown.status_code) == (401, 401)
    assert wrong.text.replace('value="han"', "") == unknown.text.replace('value="nobody"', "")
    assert "不匹配" in wrong.text


def test_what_is_typed_into_the_form_is_not_run_as_html(studio):
    page = studio().post("/login", data={"name": '"><script>alert(1)</script>', "password": "x"}).text
    assert "<script" not in page


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://studio.lan.evil.example", "http://[bad"])
def test_a_form_from_another_site_is_refused(studio, origin):
    client = studio()
    assert client.post("/login", data=RIGHT, headers={"Origin": origin}).status_code == 403
    assert client.post("/login", data=RIGHT, headers={"Referer": f"{origin}/page"}).status_code == 403


def test_a_form_from_the_studio_itself_is_taken(studio):
    assert studio().post("/login", data=RIGHT, headers={"Origin": "http://studio.lan:7860"}).status_code == 303
    proxied = {"Origin": "https://ai.example", "X-Forwarded-Host": "ai.example"}
    assert studio().post("/login", data=RIGHT, headers=proxied).status_code == 303


def test_a_huge_form_is_no_login(studio):
    assert studio().post("/login", data=RIGHT | {"name": "x" * 100_000}).status_code == 401


@pytest.mark.parametrize("cut", [True, False])
def test_a_sub_path_works_whether_or_not_the_proxy_cuts_it_off(studio, cut):
    client = studio("/studio/")
    prefix = "" if cut else "/studio"
    assert client.get(f"{prefix}/", headers=HTML).headers["location"] == "/studio/login"
    assert 'action="/studio/login"' in client.get(f"{prefix}/login").text
    answer = client.post(f"{prefix}/login", data=RIGHT)
    assert answer.headers["location"] == "/studio/"
    assert "Path=/studio" in answer.headers["set-cookie"]
    cookie = answer.headers["set-cookie"].partition(";")[0]
    assert client.get(f"{prefix}/", headers={"Cookie": cookie}).text == "han"


def test_two_studios_on_one_host_have_cookies_of_their_own(tmp_path):
    doors = [LoginRequired(None, tmp_path / "users", tmp_path / name, tmp_path / "ended") for name in "ab"]
    assert doors[0].cookie != doors[1].cookie


@pytest.fixture
def no_time(monkeypatch):
    """However slow this machine is, no time passes for the login."""
    monkeypatch.setattr("webui.login.time", SimpleNamespace(monotonic=lambda: 1000.0))


@pytest.mark.usefixtures("no_time")
def test_guessing_gets_slower(studio):
    client = studio()
    answers = [client.post("/login", data={"name": "han", "password": str(i)}) for i in range(FREE_TRIES + 1)]
    assert [answer.status_code for answer in answers] == [401] * FREE_TRIES + [429]
    assert int(answers[-1].headers["retry-after"]) == 1
    assert client.post("/login", data=RIGHT).status_code == 429  # the right one waits too: else it would be told


def test_the_wait_doubles_up_to_a_minute_and_is_forgotten():
    attempts = Attempts()
    waits = []
    for _ in range(FREE_TRIES + 8):
        attempts.failed("a", now=0)
        waits.append(attempts.wait("a", now=0))
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert attempts.wait("a", now=60) == 0
    assert attempts.wait("b", now=0) == 0
    attempts.failed("a", now=4000)
    assert attempts.wait("a", now=4000) == 0


def test_a_flood_of_addresses_does_not_fill_the_memory():
    attempts = Attempts()
    for number in range(MAX_ADDRESSES + 50):
        attempts.failed(str(number), now=0)
    assert len(attempts.known) == MAX_ADDRESSES


# ------------------------------------------------------------------------------------------ roles and passwords


def test_the_app_is_told_the_role_of_the_next_request_on(studio, tmp_path):
    client = studio()
    client.post("/login", data=RIGHT)
    assert client.get("/role").text == "operator"
    users.set_role(tmp_path / "users", "han", "viewer")
    assert client.get("/role").text == "viewer"


def test_a_password_is_changed_with_the_old_one_and_other_sessions_end(studio, tmp_path):
    here, there, file = studio(), studio(), tmp_path / "users"
    for client in (here, there):
        client.post("/login", data=RIGHT)
    users.set_role(file, "han", "viewer")

    def change(old, new, again, **more):
        return here.post("/password", data={"old": old, "new": new, "again": again}, **more)

    for page in ("/password", "/password?x=<script>"):
        assert "<script" not in here.get(page).text
    assert (
        change(
            "correct horse", "another horse", "another horse", headers={"Origin": "https://evil.example"}
        ).status_code
        == 403
    )
    assert "not right" in change("wrong", "another horse", "another horse").text
    assert "differ" in change("correct horse", "another horse", "another hors").text
    assert "8 to 256 characters" in change("correct horse", "short", "short").text
    assert "8 to 256 characters" in change("correct horse", "x" * 300, "x" * 300).text
    assert here.put("/password").status_code == 405
    assert there.get("/api").text == "han"  # nothing has been changed so far
    assert "is the current one" in change("correct horse", "correct horse", "correct horse").text
    changed = change("correct horse", "another horse", "another horse").headers["location"]
    assert "Your password has been changed" in here.get(changed).text
    assert (here.get("/api").text, there.get("/api").status_code) == ("han", 401)
    assert users.check_password(file, "han", "another horse")
    assert users.read_users(file)["han"].role == "viewer"


def test_a_password_that_cannot_be_written_is_said_and_recorded(studio, tmp_path, monkeypatch):
    (tmp_path / "saves").mkdir()
    client = studio(saves=tmp_path / "saves")
    client.post("/login", data=RIGHT)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "users"))

    monkeypatch.setattr("os.replace", full)
    new = {"old": "correct horse", "new": "another horse", "again": "another horse"}
    answer = client.post("/password", data=new)
    assert (answer.status_code, "No space left" in answer.text) == (507, True)
    assert audit.read(tmp_path / "saves", 1)[0].outcome == "failed"
    assert sorted(file.name for file in tmp_path.glob(".users*")) == []  # no half-written leftovers


@pytest.mark.usefixtures("no_time")
def test_guessing_the_old_password_gets_slower_and_strangers_cannot_try(studio):
    client = studio()
    assert client.post("/password", data={"old": "x"}).status_code == 401
    assert client.get("/password", headers=HTML).headers["location"] == "/login?next=%2Fpassword"
    client.post("/login", data=RIGHT)
    answers = [client.post("/password", data={"old": str(i)}).status_code for i in range(FREE_TRIES + 1)]
    assert answers == [422] * FREE_TRIES + [429]


def test_signing_in_leaves_lines_without_what_was_typed(studio, tmp_path):
    saves = tmp_path / "saves"
    saves.mkdir()
    client = studio(saves=saves)
    client.post("/login", data={"name": "correct horse", "password": "han"})  # in the wrong boxes
    client.post("/login", data={"name": "han", "password": "secret"})
    client.post("/login", data=RIGHT)
    client.post("/password", data={"old": "correct horse", "new": "another horse", "again": "another horse"})
    client.post("/logout")
    lines = [(entry.user, entry.action, entry.outcome) for entry in reversed(audit.read(saves, 10))]
    assert lines == [
        ("", "sign-in", "refused: login-wrong"),
        ("han", "sign-in", "refused: login-wrong"),
        ("han", "sign-in", "done"),
        ("han", "password", "done"),
        ("han", "sign-out", "done"),
    ]
    assert "horse" not in (saves / audit.AUDIT_FILE).read_text()


# ------------------------------------------------------------------------------------------ by a reverse proxy

PROXY, ELSEWHERE = ("10.0.0.2", 1), ("10.0.0.3", 1)


@pytest.fixture
def proxied(studio, tmp_path):
    """Makes clients of a studio that trusts a header of 10.0.0.2, by the address of their connection."""
    users.add_user(tmp_path / "users", "李雷", None, "viewer")
    app = ProxySignIn(studio().app, "X-Forwarded-User", ["10.0.0.2", "fd00::/64"])
    return lambda address: TestClient(app, base_url="http://studio.lan", follow_redirects=False, client=address)


def test_a_proxy_says_who_it_is_and_the_users_file_what_they_may(proxied):
    client = proxied(PROXY)
    name = {"X-Forwarded-User": "李雷".encode()}
    assert client.get("/api", headers=name).text == "李雷"
    assert client.get("/role", headers=name).text == "viewer"
    assert proxied(("::ffff:10.0.0.2", 1)).get("/api", headers=name).text == "李雷"
    assert proxied(("fd00::7", 1)).get("/api", headers=name).text == "李雷"
    assert client.get("/api").status_code == 401
    assert client.get("/password", headers=name).status_code == 404  # they have none here


@pytest.mark.parametrize("client", [ELSEWHERE, ("10.0.0.20", 1), ("127.0.0.1", 1), ("testclient", 1), ("", 0)])
def test_a_header_from_elsewhere_is_ignored(proxied, client):
    stranger = proxied(client)
    for more in ({}, {"X-Forwarded-For": "10.0.0.2"}, {"Forwarded": "for=10.0.0.2"}, {"X-Real-IP": "10.0.0.2"}):
        assert stranger.get("/api", headers={"X-Forwarded-User": "han"} | more).status_code == 401


@pytest.mark.parametrize(
    "name", ["nobody", "han ada", "<script>alert(1)</script>", "han,ada", "../han", "HAN", "x" * 5000]
)
def test_a_name_that_is_not_a_user_is_refused_and_not_run(proxied, name):
    answer = proxied(PROXY).get("/api", headers={"X-Forwarded-User": name})
    assert (answer.status_code, answer.headers["content-type"]) == (403, "text/plain; charset=utf-8")
    assert len(answer.text) < 500


def test_a_browser_cannot_slip_in_a_second_name(proxied):
    headers = [("X-Forwarded-User", "han"), ("x-forwarded-user", "李雷".encode())]
    assert proxied(PROXY).get("/api", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "proxies",
    [["*"], ["0.0.0.0/0"], ["::/0"], ["proxy.lan"], [""], ["10.0.0.2", "10.0.0.1/8"], ["0.0.0.0/1"], ["fc00::/7"]],
)
def test_everybody_cannot_be_a_proxy(proxies):
    with pytest.raises(Refusal):
        ProxySignIn(None, "X-Forwarded-User", proxies)


@pytest.mark.parametrize("local", ["127.0.0.1", "::1", "127.0.0.0/8"])
def test_a_proxy_on_this_machine_is_warned_of(local):
    assert loopback_warning("X-Forwarded-User", ["10.0.0.2", "10.0.0.0/8", "fd00::/64"]) is None
    assert (
        f"--trusted-proxy {local} is this machine" in loopback_warning("X-Forwarded-User", ["10.0.0.2", local]).text()
    )


def test_a_user_without_a_password_has_none_that_could_be_guessed(proxied, tmp_path):
    for password in ("", "external", "viewer"):
        assert not users.check_password(tmp_path / "users", "李雷", password)
