"""OpenAI's API over HTTP for a base model and its adapters.

GET  /health                   whether it responds, and how many answers are in progress
GET  /v1/models                the base and its adapters
POST /v1/chat/completions      streamed or not; in addition to OpenAI's settings: top_k, repetition_penalty, thinking,
                               request_id, and ignore_eos: generate up to max_tokens, ignoring end tokens
POST /v1/cancel                {"request_id"}: end the answers to this request now
POST /v1/adapters              {"name", "folder"}: add an adapter, a result below the root folders
POST /v1/score                 {"judge", "conversations"}: the scores of a reward model below the root folders
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
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

from engine.core.leases import somebody_waits
from engine.core.locks import is_locked
from engine.core.openai_errors import error_body
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import ALIVE_BYTE, write_json
from engine.core.sockets import KEEP_ALIVE_SECONDS
from engine.data.json_bodies import json_object
from engine.worker.generation.answer import Answer, Piece
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.sampling import Sampling
from engine.worker.serving.openai_responses import ChatCompletion
from engine.worker.serving.schemas import ChatCompletionRequest, ScoreRequest
from engine.worker.serving.server_state import ServerState
from engine.worker.serving.vllm import VllmGenerator

MAX_WAITING_ANSWERS = 128  # answers in progress or waiting; further requests are rejected as "busy"
IDLE_SECONDS_WITHOUT_STUDIO = IDLE_SECONDS_WHILE_A_RUN_WAITS = 60.0
HTTP_STATUS = {"chat-unknown-voice": 404, "chat-busy": 503, "chat-memory": 507, "chat-error": 500}  # otherwise 400
OPENAI_CODES = {"chat-too-long": "context_length_exceeded", "chat-unknown-voice": "model_not_found"}

# ------------------------------------------------------------------------------------------ chat completions


def _answer(state: ServerState, chat_request: ChatCompletionRequest, on_piece: Callable[[Piece], None]) -> Answer:
    """The answer to a request, not yet started. Raises Refusal if it cannot be given."""
    model = state.models.get(chat_request.model)
    if model is None:
        raise Refusal(problem("chat-unknown-voice", given=chat_request.model, known=", ".join(state.models)))
    if state.generator.waiting() >= MAX_WAITING_ANSWERS:
        raise Refusal(problem("chat-busy", waiting=MAX_WAITING_ANSWERS))
    if isinstance(state.generator, VllmGenerator) and any("images" in message for message in chat_request.messages):
        raise Refusal(problem("vllm-no-images"))
    begun = model.begun(chat_request.call).prompt
    prompt = model.prompt(chat_request.messages, chat_request.usable_tools, chat_request.thinking, begun)
    room = model.context - len(prompt) if model.context else 2**31
    max_tokens = chat_request.max_completion_tokens or chat_request.max_tokens or model.config.max_new_tokens or room
    names = [setting.name for setting in fields(Sampling)]
    return Answer(
        adapter=model.adapter,
        prompt=prompt,
        max_tokens=min(max_tokens, room),
        stop_token_ids=frozenset() if chat_request.ignore_eos else model.stop_token_ids,
        sampling=model.sampling({name: getattr(chat_request, name) for name in names}),
        detokenizer=Detokenizer(model.backend_tokenizer, chat_request.stop),
        on_piece=on_piece,
        logprobs=chat_request.top_logprobs if chat_request.logprobs else None,
        image_inputs=_decoded(model.image_inputs(chat_request.messages, prompt)),
    )


def _decoded(image_inputs: Callable[[], dict[str, Any]] | None) -> Callable[[], dict[str, Any]] | None:
    """The same, decoded now, in the thread of the request. Raises Refusal for an image that cannot be decoded."""
    if image_inputs is None:
        return None
    made = image_inputs()
    return lambda: made


async def _pieces(state: ServerState, chat_request: ChatCompletionRequest) -> AsyncGenerator[tuple[Answer, Piece]]:
    """The pieces of an answer as they come. When its reader stops, the generation is cancelled."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def on_piece(piece: Piece) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, piece)

    answer = await run_in_threadpool(_answer, state, chat_request, on_piece)
    together = state.answering.setdefault(chat_request.request_id, [])
    together.append(answer)
    state.generator.submit(answer)
    try:
        while True:
            piece = await arrived.get()
            yield answer, piece
            if piece.finish:
                return
    finally:
        answer.cancel()
        how = answer.finish or "nobody listens any more"
        print(f"{chat_request.model}: {len(answer.prompt)} + {len(answer.written)} tokens, {how}", flush=True)
        together.remove(answer)
        if not together:
            state.answering.pop(chat_request.request_id, None)
        state.last_activity = time.monotonic()


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    state: ServerState = request.app.state.server
    state.last_activity = time.monotonic()
    chat_request = ChatCompletionRequest.model_validate(await _body(request))
    began, stamp = time.monotonic(), {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    pieces = _pieces(state, chat_request)
    # Started before the response: a request that cannot be answered still gets an error status.
    first = await _unless_disconnected(request, anext(pieces))
    if first is None:
        return Response(status_code=499)
    if first[1].problem:
        await pieces.aclose()
        raise Refusal(first[1].problem)
    completion = ChatCompletion(state.models[chat_request.model], chat_request, stamp, began)
    if chat_request.stream:
        return StreamingResponse(_events(completion, first, pieces), media_type="text/event-stream")
    completion.add(*first)
    if await _unless_disconnected(request, _read_to_end(completion, pieces)) is None:
        return Response(status_code=499)
    if completion.problem:
        raise Refusal(completion.problem)
    return JSONResponse(completion.response())


async def _read_to_end(completion: ChatCompletion, pieces: AsyncIterator[tuple[Answer, Piece]]) -> ChatCompletion:
    async for answer, piece in pieces:
        completion.add(answer, piece)
    return completion


async def _unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; None once the client has disconnected, which cancels `work`."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
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


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected; the body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    completion: ChatCompletion, first: tuple[Answer, Piece], pieces: AsyncGenerator[tuple[Answer, Piece]]
) -> AsyncIterator[str]:
    """The answer as server-sent events. Closed when the client disconnects, which closes `pieces`."""
    try:
        answer, piece = first
        opens = {"opens_reasoning": completion.model.opens_reasoning(answer.prompt)}  # which only the prompt shows
        yield _event(completion.chunk({"role": "assistant", "content": ""}) | opens)
        while True:
            completion.add(answer, piece)
            text = completion.streamable_text()
            if text or piece.tokens:
                yield _event(completion.chunk({"content": text}, tokens=piece.tokens))
            if piece.finish:
                break
            answer, piece = await anext(pieces)
        if completion.problem:
            yield _event(_error(completion.problem))
            return
        if completion.calls:
            numbered = [{"index": number, **call} for number, call in enumerate(completion.calls)]
            yield _event(completion.chunk({"tool_calls": numbered}))
        beyond_openai = {"timing": completion.timing(), "cancelled": completion.finish == "cancelled"}
        yield _event(completion.chunk({}, finish=completion.finish_reason()) | beyond_openai)
        if completion.request.stream_options.include_usage:
            yield _event(completion.chunk(None) | {"choices": [], "usage": completion.usage()})
        yield "data: [DONE]\n\n"
    finally:
        await pieces.aclose()


def _event(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


# ------------------------------------------------------------------------------------------ other endpoints


async def models(request: Request) -> Response:
    """GET /v1/models"""
    state: ServerState = request.app.state.server
    entries = [
        {
            "id": name,
            "object": "model",
            "created": int(state.settings["started"]),
            "owned_by": "athanor",
            "max_model_len": model.context,
            "thinking": model.unthinking is not None,
        }
        for name, model in state.models.items()
    ]
    return JSONResponse({"object": "list", "data": entries})


async def health(request: Request) -> Response:
    """GET /health"""
    state: ServerState = request.app.state.server
    return JSONResponse({"status": "ok", "answering": sum(map(len, state.answering.values()))})


async def adapters(request: Request) -> Response:
    """POST /v1/adapters"""
    state: ServerState = request.app.state.server
    state.last_activity = time.monotonic()
    body = await _body(request)
    await run_in_threadpool(state.add_adapter, str(body.get("name", "")), str(body.get("folder", "")))
    return await models(request)


async def score(request: Request) -> Response:
    """POST /v1/score"""
    state: ServerState = request.app.state.server
    state.last_activity = time.monotonic()
    score_request = ScoreRequest.model_validate(await _body(request))
    scores = await run_in_threadpool(state.score, score_request.judge, score_request.conversations)
    return JSONResponse({"scores": scores})


async def cancel(request: Request) -> Response:
    """POST /v1/cancel"""
    state: ServerState = request.app.state.server
    body = await _body(request)
    ending = state.answering.get(str(body.get("request_id") or " "), [])
    for answer in ending:
        answer.cancel()
    return JSONResponse({"cancelled": len(ending)})


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent. Raises Refusal if it is not one."""
    return json_object(await request.body())


def _error(reason: Problem) -> dict[str, Any]:
    return error_body(reason, HTTP_STATUS.get(reason.code, 400), OPENAI_CODES.get(reason.code))


async def _refused(_request: Request, error: Exception) -> Response:
    reason = error.problems[0] if isinstance(error, Refusal) else problem("chat-request", **_validation_values(error))
    return JSONResponse(_error(reason), HTTP_STATUS.get(reason.code, 400))


async def _failed(_request: Request, error: Exception) -> Response:
    """An unexpected error, also in OpenAI's format; its traceback is in the log."""
    return JSONResponse(_error(problem("chat-error", why=f"{type(error).__name__}: {error}")), 500)


def _validation_values(error: Any) -> dict[str, str]:
    first = error.errors()[0]
    return {"what": ".".join(map(str, first["loc"])), "why": first["msg"].removeprefix("Value error, ")}


class _RequireKey:
    """Middleware that answers 401 to requests without the key; /health needs none."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            authorization = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(authorization, self.key):
                await JSONResponse(_error(problem("chat-key")), 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


# ------------------------------------------------------------------------------------------ the life of the worker


def application(state: ServerState, key: str = "") -> ASGIApp:
    """The server as an ASGI app; with a `key`, every request has to carry it."""
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/adapters", adapters, methods=["POST"]),
            Route("/v1/cancel", cancel, methods=["POST"]),
            Route("/v1/score", score, methods=["POST"]),
        ],
        exception_handlers={Refusal: _refused, ValidationError: _refused, Exception: _failed},
    )
    app.state.server = state
    return _RequireKey(app, key) if key else app


async def _end_when_idle(state: ServerState, server: uvicorn.Server) -> None:
    """End the server when it has been idle for a while; sooner if it belongs to studios and none is running, or a run
    waits for its GPU."""
    studios = state.settings.get("studios")
    while not server.should_exit:
        await asyncio.sleep(1)
        patience = state.settings["idle_s"] or float("inf")
        if studios and not is_locked(Path(studios), ALIVE_BYTE):
            patience = min(patience, IDLE_SECONDS_WITHOUT_STUDIO)
        if studios and state.settings.get("gpu") and somebody_waits(state.settings["gpu"]):
            patience = min(patience, IDLE_SECONDS_WHILE_A_RUN_WAITS)
        idle = not state.busy() and time.monotonic() - state.last_activity > patience
        if idle or state.generator.fault():
            server.should_exit = True


async def serve(state: ServerState, sock: Any, key: str, host: str = "") -> None:
    """Answer requests at the listening socket `sock` until there is a reason to end. `host`: where clients reach it, if
    that is not the address to which it is bound."""
    config = uvicorn.Config(
        application(state, key),
        log_level="warning",
        timeout_graceful_shutdown=2,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = uvicorn.Server(config)
    idle = asyncio.create_task(_end_when_idle(state, server))
    bound, port = sock.getsockname()[:2]
    host = host or bound
    write_json(state.run.path / "address.json", {"host": host, "port": port}, durable=False)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"serving {', '.join(state.models)} at {address}", flush=True)
    await server.serve(sockets=[sock])
    idle.cancel()
