"""The scripts and styles of the page: compressed once, kept by browsers, gradio's own but for two of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import brotli
import gradio
import pytest
from starlette.testclient import TestClient

from engine.launch.workspace import Workplace
from webui.studio.application import application
from webui.studio.assets import REPLACEMENTS, replaced

FOLDER = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
SCRIPT = max(FOLDER.glob("index-*.js"), key=lambda path: path.stat().st_size)
STYLE = next(FOLDER.glob("index-*.css"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder = tmp_path_factory.mktemp("assets")
    workplace = Workplace(models=(folder,), data=folder, saves=folder / "saves")
    return TestClient(application(workplace, root_path="/studio"))


@pytest.mark.parametrize("prefix", ["", "/studio"])
@pytest.mark.parametrize(("path", "kind"), [(SCRIPT, "javascript"), (STYLE, "css")])
def test_a_file_comes_compressed_and_is_kept_for_good(client: TestClient, prefix: str, path: Path, kind: str) -> None:
    for _ in range(2):
        with client.stream("GET", f"{prefix}/assets/{path.name}", headers={"Accept-Encoding": "br"}) as response:
            raw = b"".join(response.iter_raw())
        assert response.headers["content-encoding"] == "br"
        assert kind in response.headers["content-type"]
        assert {"max-age=31536000", "immutable"} <= set(response.headers["cache-control"].split(", "))
        assert len(raw) < path.stat().st_size / 2
        assert brotli.decompress(raw) == path.read_bytes()


@pytest.mark.parametrize("encodings", ["", "gzip", "identity", "gzip, br;q=0", "gzip;q=1, br; q=0.0", "brown"])
def test_whoever_reads_no_brotli_gets_the_same_bytes(client: TestClient, encodings: str) -> None:
    response = client.get(f"/assets/{SCRIPT.name}", headers={"Accept-Encoding": encodings})
    assert response.headers.get("content-encoding", "") != "br"
    assert response.content == SCRIPT.read_bytes()


@pytest.mark.parametrize("name", ["no-such.js", "..%2findex.html", "%2e%2e/%2e%2e/routes.py", "", "a%00.js"])
def test_nothing_but_these_files_is_read(client: TestClient, name: str) -> None:
    response = client.get(f"/assets/{name}", headers={"Accept-Encoding": "br"})
    assert response.status_code in (400, 403, 404)
    assert response.headers.get("content-encoding") is None


def test_a_changed_file_has_another_name() -> None:
    """That browsers may keep them for good rests on it: each name of a script contains a hash."""
    names = [path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css")]
    assert [name for name in names if not re.search(r"-[\w-]{8,}\.(js|css)$", name)] == []


@pytest.mark.parametrize("encodings", ["br", "identity"])
@pytest.mark.parametrize("pattern", REPLACEMENTS)
def test_two_scripts_are_gradios_own_but_for_what_is_replaced(client: TestClient, pattern: str, encodings: str) -> None:
    [script] = FOLDER.glob(pattern)
    text = client.get(f"/assets/{script.name}", headers={"Accept-Encoding": encodings}).text
    for search, replacement in REPLACEMENTS[pattern].items():
        assert text.count(replacement) == 1
        text = text.replace(replacement, search)
    assert text == script.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", REPLACEMENTS)
@pytest.mark.parametrize("change", [str.upper, lambda text: text * 2, lambda _: ""])
def test_a_script_that_reads_otherwise_stays_as_it_is(change: Callable[[str], str], pattern: str) -> None:
    replacements = REPLACEMENTS[pattern]
    for search in replacements:
        script = "".join(change(part) if part == search else part for part in replacements).encode()
        assert replaced(script, replacements) == script
