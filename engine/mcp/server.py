"""The tools over the Model Context Protocol, with the official package: on standard input and output, with the rights
of the shell's user, or as an ASGI app below /mcp, where programs need a token.

Nothing is kept between requests, so that a studio can be restarted at any time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import anyio
import mcp_types as types
from anyio import CapacityLimiter, to_thread
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.api.callers import MAX_TURNS, Caller, Gate, Turns
from engine.api.errors import ApiError
from engine.core import audit
from engine.core.problems import problem, shell_language
from engine.core.repetition import repeat
from engine.launch.workspace import Workplace
from engine.mcp.answers import TOOLS, Answer, answer, failed
from engine.mcp.call import Call
from engine.runs import engines
from engine.serving import servers

PATH = "/mcp"
MAX_CALLS = 64  # at once; those that wait for an answer of a model are counted apart
MAX_CALLS_OF_CALLER = 16  # of these, whichever tokens they come with
QUEUE_POLL_SECONDS = 2.0
CALLER = "athanor.caller"  # key of the ASGI scope
INSTRUCTIONS = (
    "Athanor fine-tunes language models. A run is a training, an evaluation or an export, described by a YAML spec. "
    "Take the spec of a run that is like the one you want (show_run), change it, check_spec it, then start_run it, and "
    "look at it with show_run and run_log. Runs go on without you."
)


class Calls:
    """Answers calls in threads. Of the answers of models, which take minutes, a caller leaves half for the others, and
    of other calls most."""

    def __init__(self) -> None:
        self.quick, self.waiting = CapacityLimiter(MAX_CALLS), CapacityLimiter(2 * MAX_TURNS)
        self.turns, self.quick_turns = Turns(), Turns(MAX_CALLS_OF_CALLER, "mcp-turns")

    async def answer(self, call: Call, name: str, arguments: Mapping[str, Any]) -> Answer:
        """As `engine.mcp.answers.answer`; an error if the caller has as many calls in progress as it may."""
        waits = name in TOOLS and TOOLS[name].waits
        turns, limiter = (self.turns, self.waiting) if waits else (self.quick_turns, self.quick)
        try:
            with turns.of(call.caller):
                return await to_thread.run_sync(answer, call, name, arguments, limiter=limiter)
        except ApiError as error:
            return failed([error.reason], call.language)


def _server(call_of: Callable[[Any], Call]) -> Server[Any]:
    """`call_of` says who calls, from the context of a request."""
    calls = Calls()

    async def list_tools(_context: Any, _params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=_tools())

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        done = await calls.answer(call_of(context), params.name, params.arguments or {})
        text = types.TextContent(type="text", text=done.text)
        return types.CallToolResult(content=[text], structured_content=done.content, is_error=done.failed)

    try:
        installed = version("athanor")
    except PackageNotFoundError:  # started from a checkout
        installed = ""
    return Server(
        "athanor",
        version=installed,
        title="Athanor",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _tools() -> list[types.Tool]:
    return [
        types.Tool(
            name=name,
            description=tool.description,
            input_schema=tool.arguments.model_json_schema(),
            annotations=types.ToolAnnotations(
                read_only_hint=tool.reads, destructive_hint=tool.destroys, open_world_hint=False
            ),
        )
        for name, tool in TOOLS.items()
    ]


def serve_stdio(workplace: Workplace, user: str) -> None:
    """Answer on standard input and output until the client leaves. Runs go on without it, as without a studio."""
    call = Call(workplace, Caller(audit.shell(user)), shell_language())
    server = _server(lambda _context: call)

    async def serve() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    repeat(lambda: engines.advance(workplace.saves), QUEUE_POLL_SECONDS)
    servers.attend(workplace.saves)
    anyio.run(serve)


def application(workplace: Workplace, gate: Gate) -> Starlette:
    """The ASGI app for PATH; `gate` reads the token of each request."""
    server = _server(lambda context: Call(workplace, context.request.scope[CALLER]))
    manager = StreamableHTTPSessionManager(server, json_response=True, stateless=True)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with manager.run():
            yield

    return Starlette(routes=[Route(PATH, _Guarded(manager, gate))], lifespan=lifespan)


class _Guarded:
    """Lets in who has a token. Only POST: there is nothing that the server would send by itself."""

    def __init__(self, manager: StreamableHTTPSessionManager, gate: Gate):
        self.manager, self.gate = manager, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        address = request.client.host if request.client else ""
        try:
            if request.method != "POST":
                raise _not_post(request)
            caller = await to_thread.run_sync(self.gate.caller, request.headers.get("authorization", ""), address)
        except ApiError as error:
            headers = error.headers | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})
            await JSONResponse(error.body, error.status, headers)(scope, receive, send)
        else:
            await self.manager.handle_request({**scope, CALLER: caller}, receive, send)


def _not_post(request: Request) -> ApiError:
    error = ApiError(405, problem("mcp-method", method=request.method[:20]))
    error.headers["Allow"] = "POST"
    return error
