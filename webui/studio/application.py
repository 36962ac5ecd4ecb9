"""The page in each language, and everything else that the studio serves, at one address."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.data import uploads
from engine.launch.workspace import Workplace
from webui import downloads, theme, token_pages
from webui.body_limit import BodyLimit
from webui.event_streams import UnbufferedEventStreams
from webui.notification_pages import NotificationPages
from webui.page_sessions import keep_little
from webui.people import UploadsOfUsers
from webui.people_pages import PeoplePages
from webui.reader_language import language_of
from webui.same_origin import SameOrigin
from webui.studio import first_steps, page, script_files
from webui.studio.assets import Assets
from webui.studio.start_page import StartPage
from webui.words import LANGUAGES


def application(
    workplace: Workplace,
    *,
    auth: Callable[[ASGIApp], ASGIApp] | None = None,
    root_path: str = "",
    hosts: Collection[str] | None = None,
    api: ASGIApp | None = None,
    mcp: Starlette | None = None,
    users_file: Path | None = None,
) -> ASGIApp:
    """The studio as an ASGI app. `auth` wraps it in a login; `root_path` is its external path; `hosts` are its names,
    as in `SameOrigin`; None: any name. `api` answers below /v1 and `mcp` at /mcp, where they ask for tokens
    themselves; they are those of the users in `users_file`."""
    root = root_path.rstrip("/")
    pages = {language: _mounted(page(workplace, language, root, users_file), root) for language in LANGUAGES}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        async with AsyncExitStack() as stack:
            for page_app in pages.values():
                await stack.enter_async_context(page_app.router.lifespan_context(page_app))
            if mcp:
                await stack.enter_async_context(mcp.router.lifespan_context(mcp))
            yield

    healthy = Route("/healthz", lambda _: PlainTextResponse("ok"))
    start_pages = {language: StartPage(page_app, root) for language, page_app in pages.items()}
    notifications = NotificationPages(workplace.saves, users_file, root).routes()
    of_users = []
    if users_file:
        of_users = token_pages.routes(users_file, workplace.saves, root)
        of_users += PeoplePages(workplace, users_file, root).routes()
    routes = [
        healthy,
        Assets(),
        *script_files.routes(),
        *first_steps.routes(workplace.saves),
        *downloads.routes(workplace),
        *of_users,
        *notifications,
        Mount("/", _ByLanguage(start_pages)),
    ]
    inner = Starlette(routes=routes, lifespan=lifespan)
    whole = _WithoutPrefix(UploadsOfUsers(inner), urlsplit(root).path)
    guarded: ASGIApp = BodyLimit(auth(whole) if auth else whole)
    prefix = urlsplit(root).path
    beside = {path: _WithoutPrefix(app, prefix) for path, app in {"/v1": api, "/mcp": mcp}.items() if app}
    guarded = _Beside(guarded, beside, prefix)
    return SameOrigin(UnbufferedEventStreams(guarded), hosts or (), any_host=hosts is None or auth is not None)


def _mounted(blocks: gr.Blocks, root: str) -> FastAPI:
    # Only for a launched page does gradio check whether a file named in a request was uploaded; for a mounted one it
    # would pass any file of this machine to a handler.
    blocks.has_launched = True
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        root_path=root or None,
        theme=theme.theme(),
        css=theme.css(),
        head=theme.head(),
        footer_links=[],
        max_file_size=uploads.MAX_UPLOAD_BYTES,
        run_history=False,
        favicon_path=str(theme.FOLDER / "favicon.svg"),
        app_kwargs={"openapi_url": None},
        ssr_mode=False,
    )
    keep_little(app, blocks)
    return app


class _ByLanguage:
    """Passes each request to the page in the reader's language."""

    def __init__(self, pages: Mapping[str, ASGIApp]):
        self.pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.pages[language_of(HTTPConnection(scope))](scope, receive, send)


class _Beside:
    """Passes requests at and below some paths to the apps for programs, which have their own login and limits, and all
    others to the studio."""

    def __init__(self, studio: ASGIApp, apps: Mapping[str, ASGIApp], prefix: str):
        self.studio, self.apps, self.prefix = studio, apps, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(self.prefix)
        below = (app for at, app in self.apps.items() if scope["type"] == "http" and f"{path}/".startswith(f"{at}/"))
        await next(below, self.studio)(scope, receive, send)


class _WithoutPrefix:
    """Strips the external path if a proxy has left it on."""

    def __init__(self, app: ASGIApp, prefix: str):
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix and scope["type"] != "lifespan" and scope["path"].startswith(f"{self.prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.prefix)}
        await self.app(scope, receive, send)
