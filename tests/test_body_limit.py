"""A request that carries more than the page ever sends is refused before it is held in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from engine.launch.workspace import Workplace
from tests.conftest import start_studio
from webui import body_limit
from webui.body_limit import MAX_BODY_BYTES, UPLOAD_PATH, BodyLimit

pytestmark = pytest.mark.usefixtures("forked")

CHUNK = b"x" * (1 << 20)


async def count(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr(body_limit, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(body_limit, "MAX_UPLOAD_BYTES", 3000)
    monkeypatch.setattr(body_limit, "MULTIPART_BYTES", 0)
    return TestClient(BodyLimit(Starlette(routes=[Route("/{path:path}", count, methods=["POST"])])))


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("/run", 0, 200), ("/run", 1000, 200), ("/run", 1001, 413), (UPLOAD_PATH, 3000, 200), (UPLOAD_PATH, 3001, 413)],
)
@pytest.mark.parametrize("with_length", [True, False])
def test_the_limit_holds_whether_the_length_is_told_or_not(
    client: TestClient, path: str, size: int, status: int, with_length: bool
) -> None:
    body = b"x" * size if with_length else (b"x" for _ in range(size))
    assert client.post(path, content=body).status_code == status


def test_the_refusal_is_a_sentence_in_the_readers_language(client: TestClient) -> None:
    answer = client.post("/run", content=b"x" * 2000, headers={"Accept-Language": "zh-CN"})
    assert "数据" in answer.text
    assert "Data tab" in client.post("/run", content=b"x" * 2000).text


@pytest.mark.parametrize("length", ["-1", "9" * 5000, "abc", "1e9"])
def test_a_length_that_is_no_number_is_not_believed(client: TestClient, length: str) -> None:
    answer = client.post("/run", content=b"x" * 2000, headers={"Content-Length": length})
    assert answer.status_code == 413


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield CHUNK


@pytest.mark.slow
def test_a_studio_does_not_hold_what_it_refuses(workplace: Workplace) -> None:
    studio, address = start_studio(workplace)
    browser = httpx.Client(trust_env=False, timeout=300)
    try:
        assert browser.get(address).status_code == 200
        before = psutil.Process(studio.pid).memory_info().rss
        field = {"files": (None, b"x" * (64 << 20))}  # without a file name: no file, and held in memory
        with contextlib.suppress(httpx.TransportError):
            assert browser.post(f"{address}{UPLOAD_PATH}", files=field).is_client_error
        for path in ("/gradio_api/queue/join", "/gradio_api/run/start", "/login", "/"):
            with contextlib.suppress(httpx.TransportError):  # refused before all of it was sent
                assert browser.post(f"{address}{path}", content=chunks(200)).is_client_error
        grown = psutil.Process(studio.pid).memory_info().rss - before
        assert grown < 3 * MAX_BODY_BYTES  # each time 200 MB were sent, and 64 MB as a field
        assert browser.get(address).status_code == 200
    finally:
        browser.close()
        studio.kill()
        studio.wait()
