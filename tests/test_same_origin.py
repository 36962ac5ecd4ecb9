"""No other website uses the studio through somebody's browser: foreign pages,
other ports of this machine, rebound names."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.conftest import start_studio
from webui.same_origin import SameOrigin

pytestmark = pytest.mark.usefixtures("forked")

HOME = "http://localhost:7860"
FETCH = {"Sec-Fetch-Mode": "cors"}


def client(**settings: object) -> TestClient:
    inner = Starlette(routes=[Route("/{path:path}", lambda _: PlainTextResponse("in"), methods=["GET", "POST"])])
    return TestClient(SameOrigin(inner, **settings), base_url=HOME)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("127.0.0.1:7860", 200),
        ("[::1]:7860", 200),
        ("10.0.0.7:7860", 200),
        (f"{socket.gethostname()}:7860", 200),
        ("gpu.example:7860", 200),
        ("GPU.example", 200),
        ("evil.example:7860", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("a:b:c", 403),
    ],
)
def test_without_a_login_only_names_of_this_studio_are_answered(host: str, status: int) -> None:
    assert client(hosts=["gpu.example"]).get("/", headers={"Host": host}).status_code == status


def test_with_a_login_any_name_is_answered() -> None:
    assert client(any_host=True).get("/", headers={"Host": "ai.example"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:3000",
        "http://127.0.0.1:7860",
        "null",
        "file://",
        "http://localhost:7860.evil.example",
        "x",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_page_of_another_site_is_refused(origin: str, method: str) -> None:
    answer = client().request(
        method, "/gradio_api/upload", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": HOME}, 200),
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", **FETCH}, 200),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link in somebody's mail
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", **FETCH}, 403),
    ],
)
def test_links_and_own_pages_are_let_in_and_hidden_requests_are_not(headers: dict[str, str], status: int) -> None:
    assert client().get("/", headers=headers).status_code == status


def test_behind_a_proxy_the_name_that_the_browser_used_counts() -> None:
    proxied = {"Host": "127.0.0.1:7860", "Origin": "https://ai.example"}
    assert client().post("/", headers=proxied).status_code == 403
    assert client().post("/", headers=proxied | {"X-Forwarded-Host": "ai.example"}).status_code == 200
    assert client(hosts=["ai.example"]).post("/", headers=proxied).status_code == 200
    # A proxy that leaves the port out of Host.
    assert (
        client(any_host=True).post("/", headers={"Host": "ai.example", "Origin": "https://ai.example:8443"}).status_code
        == 200
    )


def test_a_refusal_is_in_the_readers_language() -> None:
    for language, word in (("zh-CN", "本系统"), ("en", "This studio")):
        assert word in client().get("/", headers={"Host": "evil.example", "Accept-Language": language}).text


def test_nobody_frames_the_page() -> None:
    assert client().get("/").headers["content-security-policy"] == "frame-ancestors 'self'"


@pytest.fixture
def address(workplace) -> Iterator[str]:
    studio, address = start_studio(workplace)
    yield address
    studio.terminate()
    studio.wait()


@pytest.mark.slow
def test_the_real_studio_is_guarded(address: str) -> None:
    port = address.rsplit(":", 1)[1]
    assert httpx.get(address, timeout=60).status_code == 200
    assert httpx.get(address, headers={"Host": f"evil.example:{port}"}, timeout=60).status_code == 403
    for origin in (address, "http://localhost:3000", "https://evil.example"):
        answer = httpx.post(f"{address}/gradio_api/upload", headers={"Origin": origin}, timeout=60)
        assert (answer.status_code == 403) == (origin != address), origin
        assert origin == address or "access-control-allow-origin" not in answer.headers
