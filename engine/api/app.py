"""The interface over HTTP, as an ASGI app for the paths below /v1: what each path does, and who may.

Every answer is made in a thread, from the folders, and nothing is kept between requests. Bodies are limited here, since
the studio's own limits are those of its page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.api import errors, events, files, jobs, models
from engine.api.base_models import BaseModels, base_models
from engine.api.bodies import json_body, upload
from engine.api.callers import Caller, Gate, Turns
from engine.api.chat import Relay
from engine.api.errors import ApiError
from engine.api.job_requests import JobRequest
from engine.core.problems import Refusal, problem
from engine.data.json_bodies import json_object
from engine.launch.workspace import Workplace

MAX_PAGE = 10_000  # entries of a list
MAX_ANSWERS = 128  # answers that are waited for at once; a chat server gives no more
MAX_LIMIT_DIGITS = len(str(MAX_PAGE))
ORDERS = ("asc", "desc")
RESULTS = "fine-tune-results"  # purpose of the files of figures
NO_MODELS = BaseModels()  # where their names do not matter
READ = ("read", "fine-tune")
WRITE = ("fine-tune",)
ANY = ("read", "fine-tune", "chat")


@dataclass(frozen=True)
class Api:
    """The interface of one workplace. `table`: the file with the names of the base models; None: all in its folders."""

    workplace: Workplace
    gate: Gate
    table: Path | None = None
    # Answers have threads of their own: waiting for them must not keep anything else waiting.
    answering: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_ANSWERS))
    # And those that wait for a model to be loaded must not hold up answers that are being written.
    opening: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_ANSWERS))
    turns: Turns = field(default_factory=Turns)

    @property
    def models(self) -> BaseModels:
        return base_models(self.workplace, self.table)


@dataclass(frozen=True)
class Call:
    """A request of a caller; `body` is its JSON, {} without one."""

    api: Api
    caller: Caller
    request: Request
    body: Mapping[str, Any]

    @property
    def place(self) -> Workplace:
        return self.api.workplace

    @cached_property
    def models(self) -> BaseModels:
        return self.api.models

    def id(self) -> str:
        return self.request.path_params["id"]

    def job(self) -> jobs.Job:
        return jobs.find(self.place, self.models, self.id(), self.caller)

    def job_object(self, job: jobs.Job | None = None) -> dict[str, Any]:
        """The job as it is now."""
        return (job or self.job()).as_object(files.ids_by_dataset(self.place))

    def number(self, name: str, default: int) -> int:
        text = self.request.query_params.get(name, str(default))
        digits = text.isascii() and text.isdecimal() and len(text) <= MAX_LIMIT_DIGITS
        if not digits or not 1 <= int(text) <= MAX_PAGE:
            raise ApiError(400, problem("api-limit", given=text[:40], most=MAX_PAGE), name)
        return int(text)

    def page(self, entries: Sequence[Any], id_of: Callable[[Any], str], default: int) -> tuple[list[Any], bool]:
        """The entries after the one called `after`, at most `limit`, and whether there are more."""
        limit, after = self.number("limit", default), self.request.query_params.get("after")
        begin = 0
        if after:
            begin = next((at for at, entry in enumerate(entries, start=1) if id_of(entry) == after), -1)
            if begin < 0:
                raise ApiError(400, problem("api-after", given=after[:100]), "after")
        return list(entries[begin : begin + limit]), begin + limit < len(entries)


def _list(entries: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {}
    return {"object": "list", "data": entries, "has_more": more, "first_id": None, "last_id": None, **ends}


# ------------------------------------------------------------------------------------------ files


def list_files(call: Call) -> Any:
    query = call.request.query_params
    purpose, order = query.get("purpose"), query.get("order", "desc")
    if order not in ORDERS:
        raise ApiError(400, problem("api-order", given=order[:80], known=" / ".join(ORDERS)), "order")
    # When each was made, its id, and what makes its object, which reads it: only for those that are shown.
    entries: list[tuple[float, str, Callable[[], dict[str, Any]]]] = []
    if purpose in (None, files.PURPOSE):
        own = (file for file in files.uploaded(call.place) if call.caller.sees(file.owner))
        entries += [(file.created, file.id, file.as_object) for file in own]
    if purpose in (None, RESULTS):
        succeeded = (job for job in jobs.jobs(call.place, NO_MODELS, call.caller) if job.status == "succeeded")
        entries += [(ended_at(job), job.results_file_id, partial(results_object, job)) for job in succeeded]
    entries.sort(key=lambda entry: entry[:2], reverse=order == "desc")
    shown, more = call.page(entries, lambda entry: entry[1], MAX_PAGE)
    return _list([as_object() for _, _, as_object in shown], more)


def ended_at(job: jobs.Job) -> float:
    return job.run.ended or job.run.submitted


def results_object(job: jobs.Job) -> dict[str, Any]:
    """The file object of a job's figures."""
    size = events.results_size(job)
    return files.file_object(job.results_file_id, "step_metrics.csv", size, ended_at(job), RESULTS)


def _job_of_results(call: Call) -> jobs.Job | None:
    own = jobs.jobs(call.place, NO_MODELS, call.caller)
    return next((job for job in own if job.results_file_id == call.id() and job.status == "succeeded"), None)


def file_object(call: Call) -> Any:
    if job := _job_of_results(call):
        return results_object(job)
    return files.find(call.place, call.id(), call.caller).as_object()


def file_content(call: Call) -> Any:
    headers = {"X-Content-Type-Options": "nosniff"}
    if job := _job_of_results(call):
        return Response(events.results_csv(job), media_type="text/csv; charset=utf-8", headers=headers)
    file = files.find(call.place, call.id(), call.caller)
    return FileResponse(file.path, filename=file.name, media_type="application/octet-stream", headers=headers)


def delete_file(call: Call) -> Any:
    if _job_of_results(call):
        raise ApiError(400, problem("api-results-stay"), "file_id")
    files.delete(call.place, files.find(call.place, call.id(), call.caller), call.caller)
    return {"id": call.id(), "object": "file", "deleted": True}


# ------------------------------------------------------------------------------------------ jobs


def create_job(call: Call) -> Any:
    request = JobRequest.model_validate(call.body)
    return call.job_object(jobs.create(call.place, call.models, request, call.caller))


def list_jobs(call: Call) -> Any:
    own = list(jobs.jobs(call.place, call.models, call.caller))
    query = call.request.query_params
    filters = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    if query.get("metadata") == "null":
        own = [job for job in own if not job.metadata]
    own = [job for job in own if filters.items() <= (job.metadata or {}).items()]
    shown, more = call.page(own, lambda job: job.id, 20)
    ids = files.ids_by_dataset(call.place)
    return _list([job.as_object(ids) for job in shown], more)


def retrieve_job(call: Call) -> Any:
    return call.job_object()


def change_job(act: Callable[[jobs.Job, Caller], None]) -> Callable[[Call], Any]:
    """What cancels, pauses or resumes a job, and returns it."""

    def change(call: Call) -> Any:
        act(call.job(), call.caller)
        return call.job_object()

    return change


def list_events(call: Call) -> Any:
    job, limit = call.job(), call.number("limit", 20)
    happened = events.events(job, call.request.query_params.get("after", ""))
    shown = list(islice(happened, limit))
    return _list([event.as_object(job) for event in shown], next(happened, None) is not None)


def list_checkpoints(call: Call) -> Any:
    job = call.job()
    shown, more = call.page(events.checkpoints(job), lambda checkpoint: checkpoint.id(job), 10)
    return _list([checkpoint.as_object(job) for checkpoint in shown], more)


# ------------------------------------------------------------------------------------------ models


def list_models(call: Call) -> Any:
    own = models.list_models(call.place, call.models, call.caller)
    return {"object": "list", "data": [model.as_object() for model in own]}


def retrieve_model(call: Call) -> Any:
    return models.find(call.place, call.models, call.id(), call.caller).as_object()


def delete_model(call: Call) -> Any:
    models.delete(models.find(call.place, call.models, call.id(), call.caller), call.caller)
    return {"id": call.id(), "object": "model", "deleted": True}


async def create_file(api: Api, request: Request, caller: Caller) -> Response:
    await run_in_threadpool(caller.ask_leave, api.workplace.saves, "upload")
    async with upload(api.workplace, request) as (path, name):
        file = await run_in_threadpool(files.store, api.workplace, path, name, caller)
    return JSONResponse(file.as_object())


async def chat_completions(api: Api, request: Request, caller: Caller) -> Response:
    """The answer as the chat server gives it, streamed or not. If the client leaves, the answer ends."""
    body = await run_in_threadpool(json_object, await json_body(request))
    name = body.get("model")
    if not isinstance(name, str):
        raise ApiError(400, problem("chat-request", what="model", why="no text"), "model")
    with ExitStack() as held:
        held.enter_context(api.turns.of(caller))
        model = await run_in_threadpool(lambda: models.find(api.workplace, api.models, name, caller))
        relay = Relay(api.workplace, model, body, caller.name)
        held.callback(relay.close)
        opening = asyncio.ensure_future(to_thread.run_sync(_open, relay, caller, limiter=api.opening))
        leaving = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait([opening, leaving], return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not opening.done():
            relay.close()
        leaving.cancel()
        await opening
        unbuffered = {"X-Accel-Buffering": "no"}  # by a reverse proxy
        lines = _lines(relay, api.answering)
        return _Answer(held.pop_all(), lines, relay.status, unbuffered, relay.content_type)


class _Unanswered(Exception):
    """The chat server has refused the question, or the client has left."""


def _open(relay: Relay, caller: Caller) -> None:
    """Load the model and wait for the beginning of the answer; what becomes of it is in the audit. Raises Refusal."""
    with suppress(_Unanswered), caller.acting(relay.workplace.saves, "ask", relay.model.name):
        relay.open()
        if relay.status >= HTTPStatus.BAD_REQUEST:
            raise _Unanswered


class _Answer(StreamingResponse):
    """A response that lets go of what is held for it at its end, however that comes."""

    def __init__(self, held: ExitStack, lines: AsyncIterator[bytes], status: int, headers: dict[str, str], kind: str):
        super().__init__(lines, status, headers, kind)
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected; the body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _lines(relay: Relay, limiter: CapacityLimiter) -> AsyncIterator[bytes]:
    while line := await to_thread.run_sync(relay.line, limiter=limiter):
        yield line


# ------------------------------------------------------------------------------------------ HTTP

Action = Callable[[Call], Any]
# Path and method → the scopes of which a token needs one, and what is done.
ACTIONS: dict[tuple[str, str], tuple[Sequence[str], Action]] = {
    ("/files", "GET"): (READ, list_files),
    ("/files/{id}", "GET"): (READ, file_object),
    ("/files/{id}", "DELETE"): (WRITE, delete_file),
    ("/files/{id}/content", "GET"): (READ, file_content),
    ("/fine_tuning/jobs", "GET"): (READ, list_jobs),
    ("/fine_tuning/jobs", "POST"): (WRITE, create_job),
    ("/fine_tuning/jobs/{id}", "GET"): (READ, retrieve_job),
    ("/fine_tuning/jobs/{id}/cancel", "POST"): (WRITE, change_job(jobs.cancel)),
    ("/fine_tuning/jobs/{id}/pause", "POST"): (WRITE, change_job(jobs.pause)),
    ("/fine_tuning/jobs/{id}/resume", "POST"): (WRITE, change_job(jobs.resume)),
    ("/fine_tuning/jobs/{id}/events", "GET"): (READ, list_events),
    ("/fine_tuning/jobs/{id}/checkpoints", "GET"): (READ, list_checkpoints),
    ("/models", "GET"): (ANY, list_models),
    ("/models/{id:path}", "GET"): (ANY, retrieve_model),
    ("/models/{id:path}", "DELETE"): (WRITE, delete_model),
}
STREAMS: dict[tuple[str, str], tuple[Sequence[str], Callable[[Api, Request, Caller], Any]]] = {
    ("/files", "POST"): (WRITE, create_file),
    ("/chat/completions", "POST"): (("chat",), chat_completions),
}


def application(api: Api) -> Starlette:
    """The interface as an ASGI app."""

    def caller_of(request: Request, scopes: Sequence[str]) -> Caller:
        address = request.client.host if request.client else ""
        caller = api.gate.caller(request.headers.get("authorization", ""), address)
        caller.require(*scopes)
        return caller

    def endpoint(scopes: Sequence[str], action: Action) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            caller = await run_in_threadpool(caller_of, request, scopes)
            sent = await json_body(request) if request.method == "POST" else b""
            body = await run_in_threadpool(json_object, sent) if sent.strip() else {}
            answer = await run_in_threadpool(action, Call(api, caller, request, body))
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return respond

    def stream(scopes: Sequence[str], act: Callable[..., Any]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            return await act(api, request, await run_in_threadpool(caller_of, request, scopes))

        return respond

    routes = [
        *(Route(f"/v1{path}", stream(*how), methods=[method]) for (path, method), how in STREAMS.items()),
        *(Route(f"/v1{path}", endpoint(*how), methods=[method]) for (path, method), how in ACTIONS.items()),
    ]
    handlers: dict[Any, Any] = {
        ApiError: lambda _request, error: _error(error),
        Refusal: lambda _request, error: _error(errors.refused(error)),
        ValidationError: lambda _request, error: _error(errors.invalid(error)),
        HTTPException: _no_such_path,
        Exception: _failed,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _no_such_path(request: Request, error: HTTPException) -> Response:
    reason = problem("api-no-path", method=request.method[:20], path=request.url.path[:200])
    return JSONResponse(ApiError(error.status_code, reason).body, error.status_code, error.headers)


def _failed(_request: Request, error: Exception) -> Response:
    """An unexpected error, without its text, which may name paths; the traceback is in the server's log."""
    logging.getLogger("uvicorn.error").error("an error in the API", exc_info=error)
    return _error(ApiError(500, problem("api-failed", why=type(error).__name__)))
