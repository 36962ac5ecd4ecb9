"""The interface over HTTP, as an ASGI app for the paths below /v1: what each path does, and who may.

Every answer is made in a thread, from the folders, and nothing is kept between requests. Bodies are limited here, since
the studio's own limits are those of its page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

from engine.api import errors, events, files, jobs, models
from engine.api.base_models import BaseModel, base_models
from engine.api.bodies import json_body, upload
from engine.api.callers import Caller, Gate
from engine.api.chat import Relay
from engine.api.errors import ApiError
from engine.api.job_requests import JobRequest
from engine.core.problems import Refusal, problem
from engine.data.json_bodies import json_object
from engine.launch.workspace import Workplace

MAX_PAGE = 10_000  # entries of a list
MAX_ANSWERS = 128  # answers that are waited for at once; a chat server gives no more
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

    @property
    def models(self) -> Mapping[str, BaseModel]:
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

    def id(self) -> str:
        return self.request.path_params["id"]

    def job(self) -> jobs.Job:
        return jobs.find(self.place, self.api.models, self.id(), self.caller)

    def job_object(self, job: jobs.Job | None = None) -> dict[str, Any]:
        """The job as it is now."""
        return (job or self.job()).as_object(files.ids_by_dataset(self.place))

    def number(self, name: str, default: int) -> int:
        text = self.request.query_params.get(name, str(default))
        if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_PAGE:
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
    purpose, order = (call.request.query_params.get(name) for name in ("purpose", "order"))
    objects = [file.as_object() for file in files.uploaded(call.place) if call.caller.sees(file.owner)]
    objects += [results_object(job) for job in jobs.jobs(call.place, {}, call.caller) if job.status == "succeeded"]
    objects = [entry for entry in objects if purpose in (None, entry["purpose"])]
    objects.sort(key=lambda entry: entry["created_at"], reverse=order != "asc")
    return _list(*call.page(objects, lambda entry: entry["id"], MAX_PAGE))


def results_object(job: jobs.Job) -> dict[str, Any]:
    """The file object of a job's figures."""
    created = job.run.ended or job.run.submitted
    size = events.results_size(job)
    return files.file_object(job.results_file_id, "step_metrics.csv", size, created, "fine-tune-results")


def _job_of_results(call: Call) -> jobs.Job | None:
    own = jobs.jobs(call.place, {}, call.caller)
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
    return call.job_object(jobs.create(call.place, call.api.models, request, call.caller))


def list_jobs(call: Call) -> Any:
    own = list(jobs.jobs(call.place, call.api.models, call.caller))
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
    job = call.job()
    objects = [event.as_object(job) for event in events.events(job)]
    return _list(*call.page(objects, lambda entry: entry["id"], 20))


def list_checkpoints(call: Call) -> Any:
    return _list(*call.page(events.checkpoints(call.job()), lambda entry: entry["id"], 10))


# ------------------------------------------------------------------------------------------ models


def list_models(call: Call) -> Any:
    own = models.list_models(call.place, call.api.models, call.caller)
    return {"object": "list", "data": [model.as_object() for model in own]}


def retrieve_model(call: Call) -> Any:
    return models.find(call.place, call.api.models, call.id(), call.caller).as_object()


def delete_model(call: Call) -> Any:
    models.delete(models.find(call.place, call.api.models, call.id(), call.caller), call.caller)
    return {"id": call.id(), "object": "model", "deleted": True}


async def create_file(api: Api, request: Request, caller: Caller) -> Response:
    async with upload(api.workplace, request) as (path, name):
        file = await run_in_threadpool(files.store, api.workplace, path, name, caller)
    return JSONResponse(file.as_object())


async def chat_completions(api: Api, request: Request, caller: Caller) -> Response:
    """The answer as the chat server gives it, streamed or not. If the client leaves, the answer ends."""
    body = json_object(await json_body(request))
    name = body.get("model")
    if not isinstance(name, str):
        raise ApiError(400, problem("chat-request", what="model", why="no text"), "model")
    model = await run_in_threadpool(lambda: models.find(api.workplace, api.models, name, caller))
    with caller.acting(api.workplace.saves, "ask", name):
        relay = Relay(api.workplace, model, body, caller.name)
    opening = asyncio.ensure_future(to_thread.run_sync(relay.open, limiter=api.answering))
    leaving = asyncio.ensure_future(_disconnected(request))
    await asyncio.wait([opening, leaving], return_when=asyncio.FIRST_COMPLETED)
    if leaving.done() and not opening.done():
        relay.close()
    leaving.cancel()
    await opening
    unbuffered = {"X-Accel-Buffering": "no"}  # by a reverse proxy
    return StreamingResponse(_lines(relay, api.answering), relay.status, unbuffered, relay.content_type)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected; the body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _lines(relay: Relay, limiter: CapacityLimiter) -> AsyncIterator[bytes]:
    try:
        while line := await to_thread.run_sync(relay.line, limiter=limiter):
            yield line
    finally:
        relay.close()


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
            sent = await json_body(request)
            body = json_object(sent) if sent.strip() else {}
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
