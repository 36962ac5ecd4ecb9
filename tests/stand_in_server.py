"""A chat server in a thread of the test: it answers at once, and what it answers says what it was asked.

The folder, the lock, the address and the requests over loopback are as of a real one, so that `engine.serving` is not
replaced but for the child process: give `StandInServer.begin` to monkeypatch in place of `server_process.begin`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE, write_json
from engine.serving.server import Server

TIMING = {"tokens": 7, "first_s": 0.25, "tokens_per_s": 28.0}


class StandInServer:
    """All that was posted to the servers that were begun is in `requests`, as (path, body)."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.calls: list[dict[str, Any]] = []  # what the next answers call, as OpenAI writes it
        self.failing: set[str] = set()  # the models whose answers fail before their first word
        self.opens_reasoning = False  # the prompts of the next answers do
        self.answer: Callable[[Mapping[str, Any]], str] | None = None  # its answer to a body; None: as above
        self._servers: list[ThreadingHTTPServer] = []
        self._locks: list[int] = []

    def begin(self, server: Server, settings: Mapping[str, Any], key: str, foreground: bool = False) -> None:
        server.path.mkdir(parents=True)
        self._locks.append(try_lock(server.path / "lock", ALIVE_BYTE, shared=True))
        write_json(server.path / "serve.json", settings)
        models = [settings["name"], *settings["adapters"]]
        http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(models))
        self._servers.append(http)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        write_json(server.path / "address.json", {"host": "127.0.0.1", "port": http.server_port})

    def die(self) -> None:
        """As if every process had been killed."""
        while self._locks:
            os.close(self._locks.pop())
        for http in self._servers:
            http.shutdown()
            http.server_close()
        self._servers.clear()

    def posted(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.requests if where == path]

    def _handler(self, models: list[str]) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply({"data": [{"id": model} for model in models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.requests.append((self.path, body))
                if self.path == "/v1/adapters":
                    models.append(body["name"])
                    self._reply({})
                elif self.path == "/v1/score":
                    self._reply({"scores": [len(messages) / 4 for messages in body["conversations"]]})
                elif self.path == "/v1/chat/completions":
                    self._answer(body)
                else:
                    self._reply({})

            def _answer(self, body: Mapping[str, Any]) -> None:
                calls = [{"function": call} for call in stand_in.calls]
                self.send_response(200)
                self.end_headers()
                if body["model"] in stand_in.failing:
                    self._event({"error": {"message": "it is broken"}})
                    return
                opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                self._event({"choices": [opening], "opens_reasoning": stand_in.opens_reasoning})
                pieces = [f"{body['model']} heard ", f"{len(body['messages'])}."]
                try:
                    pieces = [stand_in.answer(body)] if stand_in.answer else pieces
                except Refusal as refusal:
                    issue = refusal.problems[0]
                    reason = {"code": issue.code, "values": dict(issue.values)}
                    self._event({"error": {"message": str(issue), "problem": reason}})
                    return
                for piece in pieces:
                    self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
                last = {"delta": {"tool_calls": calls} if calls else {}, "finish_reason": "stop"}
                self._event({"choices": [last], "timing": TIMING})

            def _event(self, event: Mapping[str, Any]) -> None:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

            def _reply(self, answer: Mapping[str, Any]) -> None:
                text = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
