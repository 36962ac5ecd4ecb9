"""The client of a chat server (`engine.serving.servers`) over HTTP: streamed answers, scores, adapters."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic accepts the standard one from Python 3.12 on

from engine.core.problems import Problem, Refusal, problem, sentences
from engine.core.rundir import read_json
from engine.runs import slurm
from engine.serving.server import Server
from engine.serving.servers import reward_models

SNAPSHOT_SECONDS = 0.1  # between two snapshots of answers in progress
# The page redraws all characters at each snapshot, and has to react to Stop meanwhile.
CHARACTERS_DRAWN_PER_S = 20_000
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 600.0  # until the server's machine, and the server, have answered
# Until a process that has ended is known to have ended, here and through Slurm.
ENDING_SECONDS, ENDING_ON_SLURM_SECONDS = 0.2, 5.0


class ToolCall(TypedDict):
    """A tool call."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The answer of one served model, as far as it is generated. `first_s`: seconds to its first piece; `tokens_per_s`:
    from then on. `calls`: its tool calls. `opened`: it begins within reasoning that the prompt opened."""

    model: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    tokens: int = 0
    first_s: float | None = None
    tokens_per_s: float | None = None
    finish: str = ""  # "stop", "length", "tool_calls", "cancelled", "error"
    problem: Problem | None = None
    opened: bool = False


def served_models(server: Server) -> list[dict[str, Any]]:
    """The models of a server: id, max_model_len, thinking. Raises Refusal if it does not respond."""
    return _call(server, "GET", "/v1/models")["data"]


def add(server: Server, adapters: Mapping[str, Path]) -> None:
    """Have a server load adapters that it has not loaded yet. Raises Refusal if it cannot."""
    there = {model["id"] for model in served_models(server)}
    for name, folder in adapters.items():
        if name not in there:
            _call(server, "POST", "/v1/adapters", {"name": name, "folder": str(folder)})


def score(
    server: Server, saves: Path, judge: str, conversations: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """The score of each conversation by the reward model of the run `judge`; higher is better. Raises Refusal.

    The same server loads it as a separate model at the first request.
    """
    folder = next((reward_model.folder for reward_model in reward_models(saves) if reward_model.run.id == judge), None)
    if folder is None:
        raise Refusal(problem("chat-no-result", id=judge))
    body = {
        "judge": str(folder),
        "conversations": [list(messages) for messages in conversations.values()],
    }
    scores = _call(server, "POST", "/v1/score", body)["scores"]
    return dict(zip(conversations, scores, strict=True))


def cancel(server: Server, request_id: str) -> None:
    """End the answers requested under that id; what has been generated is kept. The server is waited for no longer than
    for a connection."""
    with contextlib.suppress(Refusal):  # it has ended, and its answers with it
        _call(server, "POST", "/v1/cancel", {"request_id": request_id}, CONNECT_SECONDS)


def cancel_everywhere(servers: Iterable[Server], request_id: str) -> None:
    """`cancel` at all servers that have loaded, at once: one that does not respond delays no other."""
    ready = [server for server in servers if server.state == "ready"]
    with ThreadPoolExecutor(len(ready) or 1, thread_name_prefix="cancel") as pool:
        list(pool.map(lambda server: cancel(server, request_id), ready))


def connect(server: Server) -> http.client.HTTPConnection:
    """A connection to the server for `forward`; `shut_down` ends it from any thread, and its answer with it. Raises
    Refusal if the server has ended or cannot be reached."""
    return _connection(server)


def forward(
    server: Server, connection: http.client.HTTPConnection, body: Mapping[str, Any]
) -> http.client.HTTPResponse:
    """The server's own response to POST /v1/chat/completions, whatever its status. Raises OSError or HTTPException if
    it ends now."""
    _request(server, connection, "POST", "/v1/chat/completions", body)
    return connection.getresponse()


def answer_over(
    server: Server,
    connection: http.client.HTTPConnection,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Answer:
    """The whole answer of a served model, over a new connection (`connect`) that another thread may shut down, which
    ends it. If it fails, this is in its `problem`."""
    latest = [Answer(model)]
    body = {**settings, "model": model, "messages": list(messages), "stream": True}
    _read(server, connection, body, latest.append)
    return latest[-1]


def ask(
    server: Server, questions: Mapping[str, Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]
) -> Iterator[list[Answer]]:
    """Have each served model answer its conversation, all at once; yields snapshots of the answers until all have
    ended.

    `settings` are those of POST /v1/chat/completions. Closing the iterator ends the answers. If one fails, this is in
    its `problem`, and the others continue.
    """
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    connections = [_connection(server) for _ in questions]
    threads = []
    for (model, messages), connection in zip(questions.items(), connections, strict=True):
        body = {**settings, "model": model, "messages": list(messages), "stream": True}
        threads.append(threading.Thread(target=_read, args=(server, connection, body, answers.put), daemon=True))
    for thread in threads:
        thread.start()
    latest = {model: Answer(model) for model in questions}
    try:
        yield list(latest.values())
        while not all(snapshot.finish for snapshot in latest.values()):
            length = sum(len(snapshot.text) for snapshot in latest.values())
            due = time.monotonic() + SNAPSHOT_SECONDS + length / CHARACTERS_DRAWN_PER_S
            answer = answers.get()
            latest[answer.model] = answer
            with contextlib.suppress(queue.Empty):
                while (left := due - time.monotonic()) > 0 and not all(snapshot.finish for snapshot in latest.values()):
                    answer = answers.get(timeout=left)
                    latest[answer.model] = answer
            yield list(latest.values())
    finally:
        for connection in connections:
            shut_down(connection)


def _read(server: Server, connection: http.client.HTTPConnection, body: dict[str, Any], tell: Any) -> None:
    """Read one answer to its end, and notify each time there is more of it."""
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
            answer = replace(answer, opened=answer.opened or bool(event.get("opens_reasoning")))
            if called := choice["delta"].get("tool_calls"):
                answer = replace(answer, calls=tuple(_parsed_call(call["function"]) for call in called))
            if text := choice["delta"].get("content"):
                first = answer.first_s if answer.first_s is not None else time.monotonic() - began
                answer = replace(answer, text=answer.text + text, first_s=first)
            if choice["finish_reason"]:
                finish = "cancelled" if event.get("cancelled") else choice["finish_reason"]
                answer = replace(answer, **event["timing"], finish=finish)
            if text or answer.finish:
                tell(answer)
        if not answer.finish:
            raise ConnectionError("the answer broke off")
    except Refusal as refusal:
        tell(replace(answer, finish="error", problem=refusal.problems[0]))
    except (OSError, ValueError, http.client.HTTPException, AttributeError):  # the last: closed in another thread
        tell(replace(answer, finish="error", problem=why_broken(server)[0]))


def _parsed_call(function: Mapping[str, str]) -> ToolCall:
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}


def shut_down(connection: http.client.HTTPConnection) -> None:
    """Close a connection that another thread may be reading from: only a shutdown wakes it."""
    opened = connection.opened if isinstance(connection, _Connection) else connection.sock
    if opened:
        with contextlib.suppress(OSError):
            opened.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Connection(http.client.HTTPConnection):
    """It knows its socket also after a response that ends with the connection has taken it over."""

    opened: socket.socket | None = None

    def connect(self) -> None:
        super().connect()
        self.opened = self.sock


def _connection(server: Server, limit_s: float = ANSWER_SECONDS) -> http.client.HTTPConnection:
    address = read_json(server.path / "address.json")
    if not address:
        raise Refusal(why_broken(server))
    connection = _Connection(address["host"], address["port"], timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(limit_s)
    except OSError as error:
        raise Refusal(why_broken(server, error, **address)) from None
    return connection


def why_broken(server: Server, error: OSError | None = None, host: str = "", port: int = 0) -> list[Problem]:
    """Why a connection to the server has ended, or why there is none. `error`: why its machine could not be reached
    there."""
    slurm.forget()
    deadline = time.monotonic() + (ENDING_ON_SLURM_SECONDS if server.on_slurm else ENDING_SECONDS)
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    if error and server.on_slurm and server.alive:
        why = error.strerror or str(error)
        return [problem("chat-unreachable", name=server.name, host=host, port=port, why=why)]
    return server.problems or [problem("chat-died", name=server.name)]


def _request(server: Server, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> None:
    key = server.path / "key"
    headers = {"Content-Type": "application/json"}
    if key.exists():
        headers["Authorization"] = f"Bearer {key.read_text(encoding='utf-8')}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)


def _send(
    server: Server, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> http.client.HTTPResponse:
    _request(server, connection, method, path, body)
    response = connection.getresponse()
    if response.status >= 400:
        raise Refusal(_problem(json.loads(response.read())))
    return response


def _call(server: Server, method: str, path: str, body: Any = None, limit_s: float = ANSWER_SECONDS) -> Any:
    """The server's response to one request. Raises Refusal with its error, if it has ended, or if it does not respond
    within `limit_s`."""
    connection = _connection(server, limit_s)
    try:
        return json.loads(_send(server, connection, method, path, body).read())
    except (OSError, ValueError, http.client.HTTPException):
        raise Refusal(why_broken(server)) from None
    finally:
        connection.close()


def _problem(reply: Mapping[str, Any]) -> Problem:
    """The problem in a server's error response, as a code, so that it can be shown in the reader's language."""
    error = reply["error"]
    details = error.get("problem") or {}
    known = details.get("code") in sentences()
    return Problem(details["code"], "", details["values"]) if known else problem("chat-error", why=error["message"])
