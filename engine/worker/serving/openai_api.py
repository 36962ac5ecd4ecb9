"""OpenAI's interface over HTTP to a base model and adapters of it.

GET  /health                   whether it answers, and how many answers are being written
GET  /v1/models                the voices
POST /v1/chat/completions      stream or not; beside OpenAI's settings top_k, repetition_penalty, thinking, request_id,
                               and ignore_eos: write on to max_tokens, whatever the model thinks
POST /v1/cancel                {"request_id"}: the answers that were asked for under it end now
POST /v1/adapters              {"name", "folder"}: one more voice, of a result below the roots
POST /v1/score                 {"judge", "conversations"}: what a reward model below the roots thinks of each
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import ALIVE, held, write_json
from engine.data.row_files import half_character
from engine.worker.generation.detokenizer import Wording
from engine.worker.generation.generator import Answer, Piece
from engine.worker.generation.sampling import Sampling
from engine.worker.serving.openai_responses import Reading
from engine.worker.serving.schemas import Judged, Wanted
from engine.worker.serving.server_state import House

WAITING = 128  # answers that may be wanted at once; who comes then is asked to come later
ALONE_S = 60.0  # how long it waits without questions when no studio lives
STATUS = {"chat-unknown-voice": 404, "chat-busy": 503, "chat-memory": 507, "chat-error": 500}  # else 400
OPENAI_CODES = {"chat-too-long": "context_length_exceeded", "chat-unknown-voice": "model_not_found"}

# ------------------------------------------------------------------------------------------ questions and answers


def _answer(house: House, wanted: Wanted, tell: Callable[[Piece], None]) -> Answer:
    """The answer that is wanted, not yet begun. Raises Refusal if it cannot be."""
    speaking = house.voices.get(wanted.model)
    if speaking is None:
        raise Refusal(problem("chat-unknown-voice", given=wanted.model, known=", ".join(house.voices)))
    if house.writer.waiting() >= WAITING:
        raise Refusal(problem("chat-busy", waiting=WAITING))
    begun = speaking.begun(wanted.call).prompt
    prompt = speaking.prompt(wanted.messages, wanted.usable_tools, wanted.thinking, begun)
    room = speaking.context - len(prompt) if speaking.context else 2**31
    most = wanted.max_completion_tokens or wanted.max_tokens or speaking.config.max_new_tokens or room
    names = [one.name for one in fields(Sampling)]
    return Answer(
        adapter=speaking.adapter, prompt=prompt, most=min(most, room), ends=frozenset() if wanted.ignore_eos else speaking.ends,
        sampling=speaking.sampling({name: getattr(wanted, name) for name in names}),
        wording=Wording(speaking.words, wanted.stop), tell=tell,
        logprobs=wanted.top_logprobs if wanted.logprobs else None,
    )  # fmt: skip


async def _pieces(house: House, wanted: Wanted) -> AsyncIterator[tuple[Answer, Piece]]:
    """An answer as it comes. It ends with whoever reads it: nobody reads on, nothing is written on."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece]()
    answer = await run_in_threadpool(
        _answer, house, wanted, lambda piece: loop.call_soon_threadsafe(arrived.put_nowait, piece)
    )
    together = house.answering.setdefault(wanted.request_id, [])
    together.append(answer)
    house.writer.ask(answer)
    try:
        while True:
            piece = await arrived.get()
            yield answer, piece
            if piece.finish:
                return
    finally:
        answer.cancel()
        how = answer.finish or "nobody listens any more"
        print(f"{wanted.model}: {len(answer.prompt)} + {len(answer.written)} tokens, {how}", flush=True)
        together.remove(answer)
        if not together:
            house.answering.pop(wanted.request_id, None)
        house.asked = time.monotonic()


async def complete(request: Request) -> Response:
    """POST /v1/chat/completions"""
    house: House = request.app.state.house
    house.asked = time.monotonic()
    wanted = Wanted.model_validate(await _body(request))
    began, stamp = time.monotonic(), {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    pieces = _pieces(house, wanted)
    # Begun before the response is: whatever cannot be answered is still an error of its own.
    first = await _unless_gone(request, anext(pieces))
    if first is None:
        return Response(status_code=499)
    if first[1].problem:
        await pieces.aclose()
        raise Refusal(first[1].problem)
    read = Reading(house.voices[wanted.model], wanted, stamp, began)
    if wanted.stream:
        return StreamingResponse(_events(read, first, pieces), media_type="text/event-stream")
    read.add(*first)
    if await _unless_gone(request, _read_on(read, pieces)) is None:
        return Response(status_code=499)
    if read.problem:
        raise Refusal(read.problem)
    return JSONResponse(read.whole())


async def _read_on(read: Reading, pieces: AsyncIterator[tuple[Answer, Piece]]) -> Reading:
    async for answer, piece in pieces:
        read.add(answer, piece)
    return read


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives; None once the asker has gone away, and `work` is ended."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return None
    finally:
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Comes back when the asker has gone away; the body has been read, so nothing else is to be heard."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    read: Reading, first: tuple[Answer, Piece], pieces: AsyncIterator[Any]
) -> AsyncIterator[str]:
    """The answer as server-sent events. Closed when the asker goes, which closes `pieces`."""
    try:
        yield _event(read.chunk({"role": "assistant", "content": ""}))
        answer, piece = first
        while True:
            read.add(answer, piece)
            text = read.ready()
            if text or piece.tokens:
                yield _event(read.chunk({"content": text}, tokens=piece.tokens))
            if piece.finish:
                break
            answer, piece = await anext(pieces)
        if read.problem:
            yield _event(_error(read.problem))
            return
        if read.calls:
            numbered = [{"index": number, **call} for number, call in enumerate(read.calls)]
            yield _event(read.chunk({"tool_calls": numbered}))
        yield _event(read.chunk({}, finish=read.reason()) | {"timing": read.timing()})
        if read.wanted.stream_options.include_usage:
            yield _event(read.chunk(None) | {"choices": [], "usage": read.usage()})
        yield "data: [DONE]\n\n"
    finally:
        await pieces.aclose()


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


# ------------------------------------------------------------------------------------------ the other doors


async def models(request: Request) -> Response:
    """GET /v1/models"""
    house: House = request.app.state.house
    told = [
        {
            "id": name, "object": "model", "created": int(house.given["started"]), "owned_by": "athanor",
            "max_model_len": one.context, "thinking": one.unthinking is not None,
        }
        for name, one in house.voices.items()
    ]  # fmt: skip
    return JSONResponse({"object": "list", "data": told})


async def health(request: Request) -> Response:
    """GET /health"""
    house: House = request.app.state.house
    return JSONResponse({"status": "ok", "answering": sum(map(len, house.answering.values()))})


async def adapters(request: Request) -> Response:
    """POST /v1/adapters"""
    house: House = request.app.state.house
    house.asked = time.monotonic()
    body = await _body(request)
    await run_in_threadpool(house.add, str(body.get("name", "")), str(body.get("folder", "")))
    return await models(request)


async def score(request: Request) -> Response:
    """POST /v1/score"""
    house: House = request.app.state.house
    house.asked = time.monotonic()
    wanted = Judged.model_validate(await _body(request))
    told = await run_in_threadpool(house.score, wanted.judge, wanted.conversations)
    return JSONResponse({"scores": told})


async def cancel(request: Request) -> Response:
    """POST /v1/cancel"""
    house: House = request.app.state.house
    body = await _body(request)
    ending = house.answering.get(str(body.get("request_id") or " "), [])
    for answer in ending:
        answer.cancel()
    return JSONResponse({"cancelled": len(ending)})


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent. Raises Refusal if it is none."""
    sent = await request.body()
    try:
        body = json.loads(sent)
    except (ValueError, RecursionError) as error:  # the latter: thousands of brackets
        raise Refusal(problem("chat-request", what="—", why=error)) from None
    if not isinstance(body, dict):
        raise Refusal(problem("chat-request", what="—", why="not a JSON object"))
    if found := half_character(body, sent):
        raise Refusal(problem("chat-request", what="—", why=f"{found} is half of a character"))
    return body


def _error(one: Problem) -> dict[str, Any]:
    """OpenAI's shape of an error; the code and values of ours are in it, for who can tell them in another language."""
    values = {name: str(value) for name, value in one.values.items()}
    kind = "invalid_request_error" if STATUS.get(one.code, 400) < 500 else "server_error"
    told = {"message": one.text(), "type": kind, "param": None, "code": OPENAI_CODES.get(one.code, one.code)}
    return {"error": told | {"problem": {"code": one.code, "values": values}}}


async def _refused(_request: Request, error: Exception) -> Response:
    one = error.problems[0] if isinstance(error, Refusal) else problem("chat-request", **_wrong(error))
    return JSONResponse(_error(one), STATUS.get(one.code, 400))


async def _failed(_request: Request, error: Exception) -> Response:
    """Whatever nobody has thought of, in OpenAI's shape too; its traceback is in the log."""
    return JSONResponse(_error(problem("chat-error", why=f"{type(error).__name__}: {error}")), 500)


def _wrong(error: Any) -> dict[str, str]:
    first = error.errors()[0]
    return {"what": ".".join(map(str, first["loc"])), "why": first["msg"].removeprefix("Value error, ")}


class _WithKey:
    """Lets in who says the key."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            said = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(said, self.key):
                await JSONResponse(_error(problem("chat-key")), 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


# ------------------------------------------------------------------------------------------ the life of the worker


def application(house: House, key: str = "") -> ASGIApp:
    """The server as an ASGI app; with a `key`, for those who have it."""
    app = Starlette(
        routes=[
            Route("/health", health), Route("/v1/models", models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/adapters", adapters, methods=["POST"]), Route("/v1/cancel", cancel, methods=["POST"]),
            Route("/v1/score", score, methods=["POST"]),
        ],
        exception_handlers={Refusal: _refused, ValidationError: _refused, Exception: _failed},
    )  # fmt: skip
    app.state.house = house
    return _WithKey(app, key) if key else app


async def _end_when_idle(house: House, server: uvicorn.Server) -> None:
    """Ends the server when nobody has asked for a while; sooner if it belongs to studios and none is there."""
    studios = house.given.get("studios")
    while not server.should_exit:
        await asyncio.sleep(1)
        patience = house.given["idle_s"] or float("inf")
        if studios and not held(Path(studios), ALIVE):
            patience = min(patience, ALONE_S)
        idle = not house.busy() and time.monotonic() - house.asked > patience
        if idle or house.writer.fault():
            server.should_exit = True


async def serve(house: House, door: Any, key: str) -> None:
    """Answer at the listening socket `door` whoever has the `key`, until there is a reason to end."""
    config = uvicorn.Config(application(house, key), log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    idle = asyncio.create_task(_end_when_idle(house, server))
    host, port = door.getsockname()[:2]
    write_json(house.run.path / "address.json", {"host": host, "port": port})
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"serving {', '.join(house.voices)} at {address}", flush=True)
    await server.serve(sockets=[door])
    idle.cancel()
