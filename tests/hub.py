"""A model hub on this machine, as far as the clients of the real ones ask: `with Hub({"org/name": folder}) as hub`.

Both dialects are spoken, Hugging Face's and ModelScope's. A repository is a folder; what it has besides `main` are
folders by revision. Requests are noted, and a test may hold a file back, refuse a repository or end in mid-file.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Variables for the clients of both: on a machine that does much else, this hub may be slow to answer.
PATIENCE = {
    "HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600",
    "MODELSCOPE_API_TIMEOUT": "600", "MODELSCOPE_DOWNLOAD_TIMEOUT": "600",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "600", "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "0",
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """A server on a free port of this machine, in a thread, from `with` to its end."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Path], port: int = 0):
        super().__init__(("127.0.0.1", port), _Answer)
        self.repositories = dict(repositories)
        self.revisions: dict[str, Path] = {}  # of every repository
        self.refused: dict[str, tuple[int, str]] = {}  # name → status and Hugging Face's word for why
        self.held: dict[str, threading.Event] = {}  # file name → until when it is not sent
        self.dies_in = ""  # the file in whose middle the server goes away for good
        self.asked: list[str] = []
        self.sizes: dict[str, int] = {}  # file name → what is said of its size
        self.sent: set[str] = set()
        self.gone = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for event in self.held.values():
            event.set()
        self.shutdown()
        self.server_close()

    def folder(self, name: str, revision: str) -> Path | None:
        main = self.repositories[name]
        known = {"main": main, "master": main, sha(main): main}
        for revision_name, other in self.revisions.items():
            known |= {revision_name: other, sha(other): other}
        return known.get(revision)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news."""


def sha(folder: Path) -> str:
    """What stands for the commit of a folder."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def finish_without_a_word(self) -> None:
        self.close_connection = True
        self.connection.close()

    def do_GET(self) -> None:
        if self.server.gone:
            return self.finish_without_a_word()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.asked.append(f"{self.command} {path}")
        name = next((name for name in self.server.repositories if f"/{name}/" in f"{path}/"), "")
        status, why = self.server.refused.get(name, (200, "") if name else (404, "RepoNotFound"))
        if status != 200:
            return self._say({"error": why}, status, {"X-Error-Code": why})
        before, rest = (part.strip("/") for part in path.split(name, 1))
        if before in ("api/v1/models", "api/v1/datasets"):
            return self._modelscope(name, rest, query)
        kind, revision, file = (
            ["resolve", *rest.split("/", 2)[1:], ""][:3] if not before else [*rest.split("/", 2), ""][:3]
        )
        folder = self.server.folder(name, revision)
        if folder is None:
            return self._say({}, 404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "resolve":
            return self._file(folder, file)
        listed = [
            {
                "type": "file",
                "path": str(one.relative_to(folder)),
                "size": one.stat().st_size,
                "oid": sha(one),
            }
            for one in files(folder)
        ]
        siblings = [{"rfilename": one["path"]} for one in listed]
        return self._say(listed if kind == "tree" else {"id": name, "sha": sha(folder), "siblings": siblings})

    def _modelscope(self, name: str, rest: str, query: Mapping[str, list[str]]) -> None:
        folder = self.server.folder(name, query.get("Revision", ["master"])[0])
        if folder is None:
            return self._say({"Code": 404, "Message": "no such revision", "Success": False}, 404)
        if rest in ("repo/files", "repo/tree"):  # of a model, of a data set
            listed = [
                {
                    "Path": str(one.relative_to(folder)),
                    "Type": "blob",
                    "Size": one.stat().st_size,
                    "Sha256": hashlib.sha256(one.read_bytes()).hexdigest(),
                }
                for one in files(folder)
            ]
            return self._say({"Code": 200, "Success": True, "Data": {"Files": listed}})
        if rest == "repo":
            return self._file(folder, query["FilePath"][0])
        return self._say({"Code": 200, "Success": True, "Data": {"Name": name}})

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._say({}, 404, {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{sha(path)}"', "X-Repo-Commit": sha(folder), "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._start(206 if begin else 200, self.server.sizes.get(name, len(content)) - begin, headers)
        if self.command == "HEAD":
            return None
        if name in self.server.held:
            self.server.held[name].wait(600)
        if name == self.server.dies_in:
            while len(self.server.sent) + 1 < len(files(folder)):
                time.sleep(0.05)  # all that is not cut off is whole
            self.wfile.write(content[begin : begin + len(content) // 2])
            self.server.gone = True
            self.server.socket.close()
            return self.finish_without_a_word()
        self.wfile.write(content[begin:])
        self.server.sent.add(name)
        return None

    def _say(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._start(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
