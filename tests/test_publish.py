"""An export is uploaded only when asked to, with a token that nothing keeps: against a hub of the test's own."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, write_json
from engine.launch.workspace import Workplace
from engine.runs import publish, runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec

TOKEN = "hf_thisIsASecretThatNobodyKeeps"


@dataclass
class Hub:
    """What a hub was asked: (method, path, token), the repository that was made, and the files of its commits."""

    asked: list[tuple[str, str, str]] = field(default_factory=list)
    made: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""


class HubHandler(BaseHTTPRequestHandler):
    """The few endpoints that huggingface_hub calls; whoever brings another token is refused."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body, hub = self._body(), self.hub
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.asked.append(("POST", self.path, token))
        if token != TOKEN:
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self._answer(200, {"url": f"{hub.address}/team/named", "name": "team/named"})
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer(200, {"files": modes})
        if "/commit/" in self.path:
            return self._answer(200, self._commit(body))
        return self._answer(200, {})

    def _commit(self, body: bytes) -> dict:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = "1" * 40
        return {"commitOid": oid, "commitUrl": f"{self.hub.address}/team/named/commit/{oid}"}

    def do_GET(self) -> None:
        self.hub.asked.append(("GET", self.path, self.headers.get("Authorization", "")))
        self._answer(404, {"error": "not here"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    # As a studio without internet has it: somebody asks for the network now.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(workplace: Workplace) -> Run:
    """A finished run with two files in its result, and a hidden one."""
    run = RunDir(workplace.saves / "tiny" / "export" / "done")
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    (run.model / "model.safetensors").write_bytes(b"weights" * 1000)
    (run.model / ".hidden").write_text("not for others")
    write_json(run.model / "result.json", {"attempt": 1, "stage": "sft", "complete": True})
    run.spec.write_text(RunSpec().to_yaml(), encoding="utf-8")
    write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
    write_json(run.request, {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})
    return runs.read(run.path, workplace.saves)


def everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_every_file_arrives_in_a_private_repository_and_the_token_is_kept_nowhere(
    hub: Hub, exported: Run, workplace: Workplace
) -> None:
    told = publish.publish(exported, "team/named", f" {TOKEN}\n", by="ada")
    assert hub.made.get("visibility") == "private", hub.made
    assert (hub.made["organization"], hub.made["name"]) == ("team", "named")
    assert set(hub.files) == {"config.json", "model.safetensors", "result.json"}
    assert hub.files["model.safetensors"] == (exported.dir.model / "model.safetensors").read_bytes()
    assert (told["url"], told["commit"]) == (f"{hub.address}/team/named", "1" * 40)
    assert publish.published(exported) == told
    assert TOKEN.encode() not in everything(workplace.saves)
    assert {token for method, _, token in hub.asked if method == "POST"} == {TOKEN}


@pytest.mark.slow
def test_a_token_that_may_not_write_is_told_and_not_repeated(hub: Hub, exported: Run) -> None:
    with pytest.raises(Refusal) as refused:
        publish.publish(exported, "team/named", "hf_wrong")
    assert refused.value.problems[0].code == "upload-refused"
    assert "hf_wrong" not in refused.value.text()
    assert publish.published(exported) is None


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_told(exported: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Refusal, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        publish.publish(exported, "team/named", TOKEN)


def test_nothing_is_sent_without_a_name_or_a_token(exported: Run) -> None:
    for repo, token, code in (("no name", TOKEN, "upload-name"), ("team/named", " ", "upload-no-token")):
        with pytest.raises(Refusal) as refused:
            publish.publish(exported, repo, token)
        assert refused.value.problems[0].code == code
