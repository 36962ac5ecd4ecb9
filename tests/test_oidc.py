"""Sign-in through an OpenID provider: a real small one, and what a dishonest one, or somebody in between, may try."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode, urlsplit

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from engine.core import audit, users
from engine.core.problems import Refusal
from engine.core.sockets import listen
from tests.no_space import no_space
from tests.ports import reserved_ports
from webui.login import LoginRequired
from webui.oidc import Oidc, Provider

joserfc_jwt = pytest.importorskip("joserfc.jwt")
from joserfc.jwk import OctKey, RSAKey  # noqa: E402

CLIENT, SECRET = "athanor", "client secret"


@dataclass
class Issuer:
    """An OpenID provider that signs in whoever asks as `name`; `lies` replace claims, header and key of its tokens."""

    port: int
    name: str = "ada"
    key: Any = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1", "use": "sig"}))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    lies: dict[str, Any] = field(default_factory=dict)
    issuer: str = ""
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def discover(self, _: Request) -> JSONResponse:
        self.requests["discover"] += 1
        paths = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
        return JSONResponse(
            {"issuer": self.issuer or self.url} | {name: f"{self.url}/{path}" for name, path in paths.items()}
        )

    async def authorize(self, request: Request) -> RedirectResponse:
        query = dict(request.query_params)
        assert (query["client_id"], query["response_type"], query["code_challenge_method"]) == (CLIENT, "code", "S256")
        assert "openid" in query["scope"].split()
        code = f"code {len(self.codes)}"
        self.codes[code] = query
        return RedirectResponse(f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}")

    async def token(self, request: Request) -> JSONResponse:
        self.requests["token"] += 1
        form = parse_qs((await request.body()).decode())
        basic = base64.b64encode(f"{CLIENT}:{quote_plus(SECRET)}".encode()).decode()
        begun = self.codes.pop(form["code"][0], None)  # a code works once
        digest = hashlib.sha256(form["code_verifier"][0].encode()).digest()
        if (
            request.headers.get("authorization") != f"Basic {basic}"
            or begun is None
            or begun["redirect_uri"] != form["redirect_uri"][0]
            or base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != begun["code_challenge"]
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": CLIENT, "sub": "1", "iat": now, "exp": now + 60, "nonce": begun["nonce"],
            "preferred_username": self.name,
        }  # fmt: skip
        claims |= self.lies.get("claims", {})
        header = {"alg": "RS256", "kid": "1"} | self.lies.get("header", {})
        token = joserfc_jwt.encode(
            header, {name: value for name, value in claims.items() if value is not None},
            self.lies.get("key", self.key), [header["alg"]],
        )  # fmt: skip
        if self.lies.get("unsigned"):
            parts = (json.dumps({"alg": "none"}), json.dumps(claims))
            token = ".".join([*(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts), ""])
        return JSONResponse({"access_token": "x", "token_type": "Bearer", "id_token": self.lies.get("token", token)})

    async def keys(self, _: Request) -> JSONResponse:
        self.requests["keys"] += 1
        return JSONResponse({"keys": [self.key.as_dict(private=False)]})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self.discover),
                Route("/authorize", self.authorize),
                Route("/token", self.token, methods=["POST"]),
                Route("/keys", self.keys),
            ]
        )


@pytest.fixture(scope="module")
def running() -> Iterator[Issuer]:
    socket = listen("127.0.0.1", 0)
    issuer = Issuer(socket.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(issuer.app(), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield issuer
    server.should_exit = True
    thread.join()


@pytest.fixture
def issuer(running: Issuer) -> Issuer:
    running.name, running.issuer = "ada", ""
    running.lies.clear()
    running.requests.clear()
    return running


@pytest.fixture
def studio(issuer: Issuer, tmp_path: Path) -> TestClient:
    """A browser at a studio whose only user has no password."""
    users.add_user(tmp_path / "users", "ada", None, "viewer")
    (tmp_path / "saves").mkdir()

    async def who(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.state.user} {request.state.role}")

    inner = Starlette(routes=[Route("/", who), Route("/here", who)])
    files = [tmp_path / name for name in ("users", "secret", "ended")]
    provider = Provider(issuer.url, CLIENT, SECRET)
    app = LoginRequired(inner, *files, saves=tmp_path / "saves", provider=provider)
    return TestClient(app, base_url="http://studio.lan", follow_redirects=False)


def at_provider(address: str) -> httpx.URL:
    """Where the provider sends a browser that comes from the studio."""
    answer = httpx.get(address, trust_env=False, timeout=60)
    return httpx.URL(answer.headers["location"])


def sign_in(studio: TestClient, target: str = "/here") -> httpx.Response:
    begun = studio.get("/login/oidc", params={"next": target})
    return studio.get(str(at_provider(begun.headers["location"])))


def test_a_user_of_the_provider_comes_in_with_the_role_of_the_users_file(studio: TestClient, tmp_path: Path) -> None:
    assert "Sign in with 127.0.0.1" in studio.get("/login").text
    answer = sign_in(studio)
    assert (answer.status_code, answer.headers["location"]) == (303, "/here")
    assert studio.get("/").text == "ada viewer"
    assert studio.get("/password").status_code == 404  # there is none
    assert [(entry.user, entry.action, entry.outcome) for entry in audit.read(tmp_path / "saves", 9)] == [
        ("ada", "sign-in", "done")
    ]
    users.remove_user(tmp_path / "users", "ada")
    assert studio.get("/").status_code == 401
    sign_in(studio)
    assert studio.get("/").status_code == 401


def test_a_copy_of_a_cookie_dies_with_the_session_and_with_the_user(
    studio: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def copied() -> dict[str, str]:
        sign_in(studio)
        return {"Cookie": "; ".join(f"{cookie.name}={cookie.value}" for cookie in studio.cookies.jar)}

    def status(session: dict[str, str]) -> int:
        studio.cookies.clear()
        return studio.get("/", headers=session).status_code

    left, stays = copied(), copied()
    assert studio.post("/logout", headers=left).status_code == 303
    assert (status(left), status(stays)) == (401, 200)
    users.remove_user(tmp_path / "users", "ada")
    assert studio.post("/logout", headers=stays).status_code == 303  # there is nobody to sign out, but the session ends
    users.add_user(tmp_path / "users", "ada", None, "viewer", take_over=True)
    assert (status(left), status(stays), status(copied())) == (401, 401, 200)
    last = copied()
    with no_space():
        answer = studio.post("/logout", headers=last | {"accept-language": "en"})
    assert (answer.status_code, "could not write down" in answer.text) == (507, True)
    assert "sign-out" in capsys.readouterr().err  # as the audit says of a line that it cannot write
    assert status(last) == 401


def test_whoever_is_not_a_user_stays_out(studio: TestClient, issuer: Issuer) -> None:
    for name in ("bob", "<script>alert(1)</script>", "", "ADA"):
        issuer.name = name
        answer = sign_in(studio)
        assert (answer.status_code, "<script" in answer.text) == (403, False)
    assert studio.get("/").status_code == 401


OTHER = RSAKey.generate_key(2048, {"kid": "1", "use": "sig"})
NOW = int(time.time())


LIES: dict[str, dict[str, Any]] = {
    "of another sign-in": {"claims": {"nonce": "another"}},
    "of no sign-in": {"claims": {"nonce": None}},
    "for another client": {"claims": {"aud": "another client"}},
    "for nobody": {"claims": {"aud": None}},
    "of another provider": {"claims": {"iss": "http://127.0.0.1:1"}},
    "expired": {"claims": {"exp": NOW - 3600}},
    "for ever": {"claims": {"exp": None}},
    "of several names": {"claims": {"preferred_username": ["ada"]}},
    "signed by another key": {"key": OTHER},
    "signed with a secret": {"key": OctKey.import_key(SECRET * 4), "header": {"alg": "HS256"}},
    "unsigned": {"unsigned": True},
    "no token": {"token": "nonsense"},
    "empty": {"token": ""},
}


WHY = {
    "signed by another key": "bad_signature",
    "signed with a secret": "Algorithm of &#x27;HS256&#x27; is not allowed",
    "unsigned": "Algorithm of &#x27;none&#x27; is not allowed",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_token_with_anything_wrong_lets_nobody_in(studio: TestClient, issuer: Issuer, lie: str) -> None:
    issuer.lies |= LIES[lie]
    answer = sign_in(studio)
    assert answer.status_code == 403
    assert WHY.get(lie, "") in answer.text
    assert studio.get("/").status_code == 401


def test_a_name_of_somebody_with_a_password_is_not_taken_from_the_provider(
    studio: TestClient, issuer: Issuer, tmp_path: Path
) -> None:
    users.add_user(tmp_path / "users", "root", "correct horse", "operator")
    issuer.name = "root"
    answer = sign_in(studio)
    assert (answer.status_code, "signs in with a password" in answer.text) == (403, True)
    assert studio.get("/").status_code == 401


def test_strangers_cause_few_requests_and_no_lines_in_the_audit(
    studio: TestClient, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webui.login.time", SimpleNamespace(monotonic=lambda: 1000.0))  # however slow this machine is
    for _ in range(20):
        assert studio.get("/login/oidc/back?state=x&code=y").status_code == 403
    begun = studio.get("/login/oidc")
    back, cookies = str(at_provider(begun.headers["location"])), dict(studio.cookies)
    studio.cookies.clear()
    for _ in range(9):
        assert studio.get("/login/oidc").status_code == 303
    assert (issuer.requests, audit.read(tmp_path / "saves", 99)) == (Counter(discover=1), [])
    statuses = []
    for _ in range(7):
        studio.cookies.clear()
        studio.cookies.update(cookies)
        statuses.append(studio.get(str(httpx.URL(back).copy_set_param("code", "x"))).status_code)
    assert statuses == [403] * 5 + [429] * 2
    assert (issuer.requests["token"], len(audit.read(tmp_path / "saves", 99))) == (5, 5)


def test_the_providers_keys_are_kept_until_it_signs_with_others(
    studio: TestClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert sign_in(studio).status_code == 303
    assert issuer.requests["keys"] == 1
    monkeypatch.setattr(issuer, "key", OTHER)
    assert sign_in(studio).status_code == 403  # a moment after the last look
    monkeypatch.setattr("webui.oidc.RETRY_SECONDS", 0)
    assert sign_in(studio).status_code == 303
    assert issuer.requests["keys"] == 2


def test_a_sign_in_that_another_browser_has_begun_is_refused(studio: TestClient, issuer: Issuer) -> None:
    begun = studio.get("/login/oidc")
    back = str(at_provider(begun.headers["location"]))
    cookies = dict(studio.cookies)
    studio.cookies.clear()
    assert studio.get(back).status_code == 403  # sent to a victim, who has begun nothing
    studio.get("/login/oidc")
    assert studio.get(back).status_code == 403  # or something else
    studio.cookies.clear()
    studio.cookies.update(cookies)
    assert studio.get("/login/oidc/back?state=x&code=y").status_code == 403
    studio.cookies.update(cookies)
    denied = studio.get(str(httpx.URL(back).copy_remove_param("code").copy_set_param("error", "<b>denied</b>")))
    assert (denied.status_code, "&lt;b&gt;denied" in denied.text) == (403, True)
    studio.cookies.update(cookies)
    assert studio.get(back).status_code == 303
    studio.cookies.update(cookies)
    assert studio.get(back).status_code == 403  # a code works once
    assert urlsplit(begun.headers["location"]).path == "/authorize"


def test_no_link_leads_to_another_site_afterwards(studio: TestClient) -> None:
    assert sign_in(studio, "//evil.example").headers["location"] == "/"
    assert sign_in(studio, "https://evil.example").headers["location"] == "/"


def test_a_provider_that_is_away_or_another_is_named(studio: TestClient, issuer: Issuer, tmp_path: Path) -> None:
    issuer.issuer = "https://other.example"
    answer = studio.get("/login/oidc")
    assert (answer.status_code, "https://other.example" in answer.text) == (502, True)
    assert (studio.get("/login/oidc").status_code, issuer.requests) == (502, Counter(discover=1))
    app = LoginRequired(None, *(tmp_path / name for name in ("users", "secret", "ended")))
    with reserved_ports(1) as [port]:  # where nobody listens
        app.oidc = Oidc(Provider(f"http://127.0.0.1:{port}", CLIENT, SECRET), b"k" * 32)
        answer = TestClient(app, follow_redirects=False).get("/login/oidc")
    assert (answer.status_code, "does not answer" in answer.text) == (502, True)
    for address in ("http://idp.example", "ftp://127.0.0.1", "idp.example", ""):
        with pytest.raises(Refusal):
            Oidc(Provider(address, CLIENT, SECRET), b"k" * 32)


def test_an_address_that_nobody_has_confirmed_is_no_name(issuer: Issuer, tmp_path: Path) -> None:
    users.add_user(tmp_path / "users", "ada@x.org", None, "user")
    files = [tmp_path / name for name in ("users", "secret", "ended")]
    inner = Starlette(routes=[Route("/here", lambda _: PlainTextResponse("in"))])
    app = LoginRequired(inner, *files, provider=Provider(issuer.url, CLIENT, SECRET, "email"))
    browser = TestClient(app, base_url="http://studio.lan", follow_redirects=False)
    for confirmed, status in ((None, 403), (False, 403), ("true", 403), (True, 303)):
        issuer.lies["claims"] = {"email": "ada@x.org", "email_verified": confirmed}
        assert sign_in(browser).status_code == status


def test_without_the_package_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Refusal, match=r"pip install -r requirements-oidc\.txt"):
        Oidc(Provider("https://idp.example", CLIENT, SECRET), b"k" * 32)
