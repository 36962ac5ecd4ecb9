"""The page is built once per address, compressed, and otherwise what gradio would have sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import brotli
import pytest
from starlette.testclient import TestClient

from engine.launch.workspace import Workplace
from webui.studio import start_page
from webui.studio.application import application
from webui.studio.start_page import MODULE_TAG, PLAIN_EVENTS

CONFIG = re.compile(r"window\.gradio_config = (\{.*?\});</script>", re.DOTALL)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = application(Workplace(saves=tmp_path_factory.mktemp("saves")))
    with TestClient(app, base_url="http://one:7860", headers={"Accept-Language": "en"}) as client:
        yield client


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hosts for which a page is built from now on."""
    hosts: list[bytes] = []
    answer = start_page._answer

    async def counted(app: Any, scope: Any, receive: Any) -> Any:
        hosts.append(dict(scope["headers"])[b"host"])
        return await answer(app, scope, receive)

    monkeypatch.setattr(start_page, "_answer", counted)
    return hosts


def test_a_page_is_built_once_per_address_and_is_gradios_own(client: TestClient, builds: list[bytes]) -> None:
    pages = {host: client.get("/?tab=runs", headers={"Host": host}).text for host in ("six:7860", "two:7860")}
    assert [client.get("/", headers={"Host": host}).text for host in pages] == list(pages.values())
    assert builds == [b"six:7860", b"two:7860"]
    for host, text in pages.items():
        assert text.count(PLAIN_EVENTS + MODULE_TAG) == 1
        # Left to gradio, and not kept, however it is written:
        assert '"deep_link_state":"invalid"' in client.get("/?deep%5Flink=x", headers={"Host": host}).text
        assert client.get("/?all_endpoints=1", headers={"Host": host}).text == text
        own = client.get("/?deep_link=", headers={"Host": host}).text
        assert text.replace(PLAIN_EVENTS, "") == own
        assert json.loads(CONFIG.search(text)[1])["root"] == f"http://{host}"  # type: ignore[index]


def test_it_is_compressed_for_whoever_reads_that(client: TestClient) -> None:
    with client.stream("GET", "/", headers={"Accept-Encoding": "br"}) as answer:
        content = b"".join(answer.iter_raw())
    assert answer.headers["Content-Encoding"] == "br"
    assert len(content) < 100_000
    plain = client.get("/", headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in plain.headers
    assert brotli.decompress(content) == plain.content
    assert {plain.headers["Vary"], answer.headers["Vary"]} == {"Accept-Encoding"}


def test_everything_else_is_left_to_gradio_and_what_is_kept_is_bounded(
    client: TestClient, builds: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/config").json()["dependencies"]
    assert client.head("/").status_code == 200
    assert client.post("/", json={}).status_code == 405
    assert builds == []
    monkeypatch.setattr(start_page, "MAX_ADDRESSES", 2)
    for host in ("three", "four", "three", "five", "four"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    assert builds == [b"three", b"four", b"five", b"four"]  # "four" was the oldest when "five" came
