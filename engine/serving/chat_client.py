"""What a server that answers (`engine.serving.servers`) is asked, over its loopback port: answers as they come, scores, adapters."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem, sentences
from engine.core.rundir import read_json
from engine.serving.servers import Server, judges

SNAPSHOTS_S = 0.1  # between two looks at answers that are being written
# Characters for which the next look is a second later: a page draws all of them anew, and has to hear Stop meanwhile.
DRAWN = 20_000


@dataclass(frozen=True)
class Answer:
    """One voice's answer as far as it is written. `first_s` to its first piece, `tokens_per_s` from there on. `calls`
    are the calls of tools in it, {"name", "arguments"}."""

    voice: str
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    tokens: int = 0
    first_s: float | None = None
    tokens_per_s: float | None = None
    finish: str = ""  # "stop", "length", "error"
    problem: Problem | None = None


def voices(server: Server) -> list[dict[str, Any]]:
    """What a server can be asked as: id, max_model_len, thinking. Raises Refusal if it does not answer."""
    return _call(server, "GET", "/v1/models")["data"]


def add(server: Server, adapters: Mapping[str, Path]) -> None:
    """Have a server take adapters in that it does not have. Raises Refusal if it cannot."""
    there = {one["id"] for one in voices(server)}
    for name, folder in adapters.items():
        if name not in there:
            _call(server, "POST", "/v1/adapters", {"name": name, "folder": str(folder)})


def score(
    server: Server, saves: Path, judge: str, conversations: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """What the reward model of the run `judge` thinks of each conversation, higher for better. Raises Refusal.

    It is loaded by the same server, as a model of its own, when it is first asked.
    """
    folder = next((one.folder for one in judges(saves) if one.run.id == judge), None)
    if folder is None:
        raise Refusal(problem("chat-no-result", id=judge))
    asked = {"judge": str(folder), "conversations": [list(one) for one in conversations.values()]}
    scores = _call(server, "POST", "/v1/score", asked)["scores"]
    return dict(zip(conversations, scores, strict=True))


def cancel(server: Server, request_id: str) -> None:
    """End the answers that were asked for under that id; what is written of them stays."""
    with contextlib.suppress(Refusal):  # it is gone, and its answers with it
        _call(server, "POST", "/v1/cancel", {"request_id": request_id})


def ask(
    server: Server, asked: Mapping[str, Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]
) -> Iterator[list[Answer]]:
    """Have each voice answer the conversation it is given, all at once; yields how far they are until all have ended.

    `settings` are those of POST /v1/chat/completions. Whoever stops reading ends the answers. What goes wrong with one
    is told in its `problem`, and the others go on.
    """
    told: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    connections = [_connection(server) for _ in asked]
    threads = []
    for (voice, messages), connection in zip(asked.items(), connections, strict=True):
        body = {**settings, "model": voice, "messages": list(messages), "stream": True}
        threads.append(threading.Thread(target=_read, args=(server, connection, body, told.put), daemon=True))
    for thread in threads:
        thread.start()
    now = {voice: Answer(voice) for voice in asked}
    try:
        yield list(now.values())
        while not all(one.finish for one in now.values()):
            length = sum(len(one.text) for one in now.values())
            due = time.monotonic() + SNAPSHOTS_S + length / DRAWN
            answer = told.get()
            now[answer.voice] = answer
            with contextlib.suppress(queue.Empty):
                while (left := due - time.monotonic()) > 0 and not all(one.finish for one in now.values()):
                    answer = told.get(timeout=left)
                    now[answer.voice] = answer
            yield list(now.values())
    finally:
        for connection in connections:
            _hang_up(connection)


def _read(server: Server, connection: http.client.HTTPConnection, body: dict[str, Any], tell: Any) -> None:
    """Read one answer to its end, and tell each time there is more of it."""
    answer, began = Answer(body["model"]), time.monotonic()
    try:
        response = _send(server, connection, "POST", "/v1/chat/completions", body)
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Refusal(_problem(event))
            choice = event["choices"][0]
            if called := choice["delta"].get("tool_calls"):
                answer = replace(answer, calls=tuple(_called(one["function"]) for one in called))
            if text := choice["delta"].get("content"):
                first = answer.first_s if answer.first_s is not None else time.monotonic() - began
                answer = replace(answer, text=answer.text + text, first_s=first)
            if choice["finish_reason"]:
                answer = replace(answer, **event["timing"], finish=choice["finish_reason"])
            if text or answer.finish:
                tell(answer)
        if not answer.finish:
            raise ConnectionError("the answer broke off")
    except Refusal as refusal:
        tell(replace(answer, finish="error", problem=refusal.problems[0]))
    except (OSError, ValueError, http.client.HTTPException, AttributeError):
        # AttributeError: hung up in another thread. The process may need a moment to be seen as gone.
        time.sleep(0.2)
        gone = server.problems or [problem("chat-died", name=server.name)]
        tell(replace(answer, finish="error", problem=gone[0]))


def _called(function: Mapping[str, str]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread may be reading from: only a shutdown wakes it."""
    if connection.sock:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(2)
    connection.close()


def _connection(server: Server) -> http.client.HTTPConnection:
    address = read_json(server.path / "address.json")
    if not address:
        raise Refusal(server.problems or [problem("chat-died", name=server.name)])
    return http.client.HTTPConnection(address["host"], address["port"], timeout=600)


def _send(
    server: Server, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> http.client.HTTPResponse:
    key = server.path / "key"
    headers = {"Content-Type": "application/json"}
    if key.exists():
        headers["Authorization"] = f"Bearer {key.read_text(encoding='utf-8')}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    if response.status >= 400:
        raise Refusal(_problem(json.loads(response.read())))
    return response


def _call(server: Server, method: str, path: str, body: Any = None) -> Any:
    """The server's answer to one request. Raises Refusal with what it refuses, or if it is gone."""
    connection = _connection(server)
    try:
        return json.loads(_send(server, connection, method, path, body).read())
    except (OSError, ValueError, http.client.HTTPException):
        raise Refusal(server.problems or [problem("chat-died", name=server.name)]) from None
    finally:
        connection.close()


def _problem(told: Mapping[str, Any]) -> Problem:
    """What a server refused something for, to be told in the reader's language."""
    error = told["error"]
    one = error.get("problem") or {}
    known = one.get("code") in sentences()
    return Problem(one["code"], "", one["values"]) if known else problem("chat-error", why=error["message"])
