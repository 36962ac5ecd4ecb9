"""OpenAI's interface over HTTP to a base model and adapters of it, and all that the process behind it holds.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.manner import Manner
from engine.problems import Problem, Refusal, problem
from engine.rowfiles import half_character
from engine.rundir import ALIVE, RunDir, held, write_json
from engine.spec import RunSpec
from engine.worker.calls import Call
from engine.worker.conversations import Conversations
from engine.worker.generation import Answer, Piece, Token, Writer
from engine.worker.model import DTYPES, load_base, precision
from engine.worker.vllm import VllmWriter
from engine.worker.voices import Voice, voice
from engine.worker.wording import Wording
from engine.workplace import inside

WAITING = 128  # answers that may be wanted at once; who comes then is asked to come later
ALONE_S = 60.0  # how long it waits without questions when no studio lives
STATUS = {"chat-unknown-voice": 404, "chat-busy": 503, "chat-memory": 507, "chat-error": 500}  # else 400
OPENAI_CODES = {"chat-too-long": "context_length_exceeded", "chat-unknown-voice": "model_not_found"}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Wanted(Manner):
    """The body of a request for an answer. What OpenAI's interface has besides is let pass and does nothing."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[str] | None = Field(None, max_length=16)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    n: Literal[1] = 1
    thinking: bool = True
    ignore_eos: bool = False
    request_id: str = Field("", max_length=100)

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools or None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("messages")
    @classmethod
    def _plain(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [_message(one) for one in value]


def _message(one: dict[str, Any]) -> dict[str, Any]:
    """A message as templates know it: its text in one piece, the arguments of its calls as objects."""
    content = one.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("only parts of type text can be read")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str | None):
        raise ValueError("the content of a message is text")
    role = "system" if one.get("role") == "developer" else one.get("role")
    if not isinstance(role, str) or role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"the role {role!r} is none of system, user, assistant, tool")
    told = {**one, "role": role, "content": content or ""}
    given = one.get("tool_calls") or []
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise ValueError("tool_calls is a list of objects")
    calls = [{**call, "function": _function(call)} for call in given]
    return told | ({"tool_calls": calls} if calls else {})


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise ValueError("each of tool_calls has a function")
    function = dict(function)
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
    return function


class Judged(BaseModel):
    """The body of a request for scores. `judge` is the result folder of a reward model."""

    judge: str
    conversations: list[list[dict[str, Any]]] = Field(min_length=1, max_length=64)


@dataclass
class House:
    """All that the server has: the writing thread, the voices by name, and what is being answered."""

    run: RunDir
    given: dict[str, Any]
    spec: RunSpec
    writer: Writer | VllmWriter
    voices: dict[str, Voice] = field(default_factory=dict)
    judges: dict[str, Any] = field(default_factory=dict)  # by folder: model and conversations
    answering: dict[str, list[Answer]] = field(default_factory=dict)  # by the id that the asker gave
    asked: float = field(default_factory=time.monotonic)  # when the last question or answer was

    def add(self, name: str, folder: str) -> None:
        """One more voice: the adapter in `folder`. Raises Refusal if it cannot be one."""
        if name in self.voices:
            return
        self._allow(folder)
        made = voice(name, folder, self.spec, self.writer.model, adapter=True)
        try:
            self.writer.call(lambda: self.writer.load_adapter(folder)).result()
        except Refusal:
            raise
        except Exception as error:
            last = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            raise Refusal(problem("chat-adapter", name=name, why=last)) from error
        self.voices[name] = made

    def add_base(self) -> None:
        """The voice of the base itself. It is left out if it has no template, and an adapter has one."""
        instead = next(iter(self.voices.values()), None)
        name, folder = self.given["name"], self.given["base"]
        base = voice(name, folder, self.spec, self.writer.model, adapter=False, instead=instead)
        self.voices = {name: base, **self.voices}

    def score(self, folder: str, conversations: list[list[dict[str, Any]]]) -> list[float]:
        """The scores of a reward model, which is loaded beside the base when it is first asked. Raises Refusal."""
        if isinstance(self.writer, VllmWriter):
            raise Refusal(problem("vllm-no-judge"))
        self._allow(folder)
        return self.writer.call(lambda: self._score(Path(folder), conversations)).result()

    def _score(self, folder: Path, conversations: list[list[dict[str, Any]]]) -> list[float]:
        from engine.worker.reward import load_reward_model, scores  # trl takes seconds to import

        if str(folder) not in self.judges:
            model, tokenizer = load_reward_model(folder)
            self.judges[str(folder)] = model, Conversations(tokenizer)
        model, reading = self.judges[str(folder)]
        told = reading.encode(
            [{"messages": list(map(_message, one)), "tools": None} for one in conversations]
        )
        if bad := [one for one in told if isinstance(one, Problem)]:
            raise Refusal(bad)
        # As it was trained: up to the token that ends the last answer.
        return scores(model, [one.ids[: one.answers[-1][1]].tolist() for one in told]).tolist()

    def _allow(self, folder: str) -> None:
        if not inside(Path(folder), tuple(map(Path, self.given["roots"]))):
            raise Refusal(problem("path-outside", path=folder, roots=", ".join(self.given["roots"])))

    def busy(self) -> bool:
        return any(self.answering.values())


# ------------------------------------------------------------------------------------------ questions and answers


def _answer(house: House, wanted: Wanted, tell: Callable[[Piece], None]) -> Answer:
    """The answer that is wanted, not yet begun. Raises Refusal if it cannot be."""
    speaking = house.voices.get(wanted.model)
    if speaking is None:
        raise Refusal(problem("chat-unknown-voice", given=wanted.model, known=", ".join(house.voices)))
    if house.writer.waiting() >= WAITING:
        raise Refusal(problem("chat-busy", waiting=WAITING))
    prompt = speaking.prompt(wanted.messages, wanted.usable_tools, wanted.thinking)
    room = speaking.context - len(prompt) if speaking.context else 2**31
    most = wanted.max_completion_tokens or wanted.max_tokens or speaking.config.max_new_tokens or room
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return Answer(
        adapter=speaking.adapter, prompt=prompt, most=min(most, room), ends=frozenset() if wanted.ignore_eos else speaking.ends,
        sampling=speaking.sampling({name: getattr(wanted, name) for name in names}),
        wording=Wording(speaking.words, wanted.stop or ()), tell=tell,
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
    read = _Reading(house.voices[wanted.model], wanted, stamp, began)
    if wanted.stream:
        return StreamingResponse(_events(read, first, pieces), media_type="text/event-stream")
    read.add(*first)
    if await _unless_gone(request, _read_on(read, pieces)) is None:
        return Response(status_code=499)
    if read.problem:
        raise Refusal(read.problem)
    return JSONResponse(read.whole())


async def _read_on(read: _Reading, pieces: AsyncIterator[tuple[Answer, Piece]]) -> _Reading:
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
    read: _Reading, first: tuple[Answer, Piece], pieces: AsyncIterator[Any]
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
        if read.wanted.stream_options and read.wanted.stream_options.include_usage:
            yield _event(read.chunk(None) | {"choices": [], "usage": read.usage()})
        yield "data: [DONE]\n\n"
    finally:
        await pieces.aclose()


def _called(one: Call) -> dict[str, Any]:
    """A call as OpenAI writes it, with the arguments as their JSON."""
    arguments = json.dumps(one["arguments"])  # escaped: a model may write half of a character
    function = {"name": one["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


class _Reading:
    """One answer as it is told to the asker.

    Where tools were given, calls of them are no part of its text once it has ended.
    """

    def __init__(self, speaking: Voice, wanted: Wanted, stamp: dict[str, Any], began: float):
        self.voice, self.wanted, self.stamp, self.began = speaking, wanted, stamp, began
        self.form = speaking.calls if wanted.usable_tools else None
        self.text, self.tokens, self.count, self.prompt = "", [], 0, 0
        self.given, self.calls = (
            0,
            [],
        )  # characters that were streamed; what was called, once the answer has ended
        self.finish, self.problem = "", None
        self.first: float | None = None
        self.last = began

    def add(self, answer: Answer, piece: Piece) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.text += piece.text
        self.tokens += piece.tokens
        self.count, self.prompt = piece.count, len(answer.prompt)
        self.finish, self.problem = piece.finish, piece.problem
        if self.form and self.finish:
            self.text, calls = self.form.split(self.text, self.wanted.usable_tools or ())
            self.calls = [_called(one) for one in calls]

    def ready(self) -> str:
        """What more of the answer can be streamed: what may be a call waits until the answer has ended."""
        upto = self.form.held(self.text) if self.form and not self.finish else len(self.text)
        text, self.given = self.text[self.given : upto], max(self.given, upto)
        return text

    def reason(self) -> str:
        """Why the answer ended, in OpenAI's words."""
        if self.calls and self.finish == "stop":
            return "tool_calls"
        return "stop" if self.finish == "cancelled" else self.finish

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.count, "total_tokens": self.prompt + self.count,
        }  # fmt: skip

    def timing(self) -> dict[str, Any]:
        """Seconds to the first piece of the answer, and tokens a second from there on."""
        first = self.first or self.last
        spent = self.last - first
        return {
            "first_s": round(first - self.began, 4), "tokens": self.count,
            "tokens_per_s": round((self.count - 1) / spent, 2) if spent > 0 and self.count > 1 else None,
        }  # fmt: skip

    def chunk(
        self, delta: dict[str, Any] | None, tokens: tuple[Token, ...] = (), finish: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        if self.wanted.logprobs:
            choice["logprobs"] = self._logprobs(tokens) if tokens else None
        return {
            **self.stamp,
            "object": "chat.completion.chunk",
            "model": self.voice.name,
            "choices": [choice],
        }

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message = {"role": "assistant", "content": self.text.strip() or None, "tool_calls": self.calls}
        choice = {
            "index": 0, "message": message, "finish_reason": self.reason(),
            "logprobs": self._logprobs(self.tokens) if self.wanted.logprobs else None,
        }  # fmt: skip
        return {
            **self.stamp, "object": "chat.completion", "model": self.voice.name, "choices": [choice],
            "usage": self.usage(), "timing": self.timing(),
        }  # fmt: skip

    def _logprobs(self, tokens: Any) -> dict[str, Any]:
        def told(id: int, logprob: float) -> dict[str, Any]:
            text = self.voice.tokenizer.decode([id])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                told(one.id, one.logprob) | {"top_logprobs": [told(*likely) for likely in one.top]}
                for one in tokens
            ]
        }


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


def _in_this_process(_run: RunDir, given: dict[str, Any], spec: RunSpec, _closing: Any) -> Writer:
    model = load_base(spec, given["base"], DTYPES[precision(spec)]).requires_grad_(False).eval()
    return Writer(model)


WRITERS = {"transformers": _in_this_process, "vllm": VllmWriter.start}


def load(run: RunDir, given: dict[str, Any], closing: contextlib.ExitStack) -> House:
    """The model and its voices in memory; `closing` ends what holds it, if that is another process. Raises Refusal, or
    whatever a library raises at a broken model."""
    spec = RunSpec.read({"model": given["model"]})
    house = House(run, given, spec, WRITERS[given["engine"]](run, given, spec, closing))
    for name, folder in given["adapters"].items():
        house.add(name, folder)
    house.add_base()
    return house


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
