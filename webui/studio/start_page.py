"""The HTML of the page, built once per address and compressed.

Gradio builds it anew for each visitor: 660 kB, most of it the configuration of all components, sent as it is. It only
depends on the address by which the studio is reached.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

import brotli
from gradio.route_utils import get_root_url
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.studio.assets import QUALITY, reads_brotli

MAX_ADDRESSES = 16  # by which the studio is reached, such as its name and its IP address; 60 kB each
OWN_HEADERS = (b"accept-encoding", b"cookie", b"authorization")
MODULE_TAG = '<script type="module"'  # gradio's program, which begins after the configuration
# Svelte wraps plain objects and arrays in proxies, but not instances of other classes. For each component, gradio looks
# through all events, which never change: half of the time to open the page went into these proxies.
PLAIN_EVENTS = """<script>
class Events extends Array {}
Object.setPrototypeOf(window.gradio_config.dependencies, Events.prototype);
</script>"""


class StartPage:
    """Answers for the page of `app`, whose external path is `root_path`; everything else is left to it."""

    def __init__(self, app: ASGIApp, root_path: str):
        self.app, self.root_path = app, root_path
        self.pages: OrderedDict[str, bytes] = OrderedDict()  # compressed, by address
        self.building = asyncio.Lock()  # built once for all who ask at the same time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = await self._page(scope, receive) if _asks_for_page(scope) else None
        await (page or self.app)(scope, receive, send)

    async def _page(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer; None if gradio's is anything but a page."""
        request = Request(scope)
        root = get_root_url(request, "/", self.root_path or scope.get("root_path"))
        content = self.pages.get(root) or await self._built(root, scope, receive)
        if content is None:
            return None
        self.pages.move_to_end(root)
        headers = {"Vary": "Accept-Encoding"}
        if reads_brotli(request.headers.get("Accept-Encoding", "")):
            return HTMLResponse(content, headers=headers | {"Content-Encoding": "br"})
        return HTMLResponse(brotli.decompress(content), headers=headers)

    async def _built(self, root: str, scope: Scope, receive: Receive) -> bytes | None:
        async with self.building:
            if root not in self.pages:
                status, content = await _answer(self.app, scope, receive)
                text = content.decode("utf-8", "replace")
                if status != HTTPStatus.OK or MODULE_TAG not in text:
                    return None
                text = text.replace(MODULE_TAG, PLAIN_EVENTS + MODULE_TAG, 1)
                compressed = await asyncio.to_thread(brotli.compress, text.encode(), brotli.MODE_TEXT, QUALITY)
                self.pages[root] = compressed
                while len(self.pages) > MAX_ADDRESSES:
                    self.pages.popitem(last=False)
            return self.pages[root]


def _asks_for_page(scope: Scope) -> bool:
    """A deep link of gradio's is a page with values that somebody else has entered."""
    is_page = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/"
    return is_page and "deep_link" not in Request(scope).query_params


async def _answer(app: ASGIApp, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """The status and the uncompressed content of the answer to this request, without what is the reader's own in it."""
    start: MutableMapping[str, Any] = {}
    content = bytearray()

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            content.extend(message.get("body", b""))

    common = [(name, value) for name, value in scope["headers"] if name not in OWN_HEADERS]
    await app({**scope, "headers": common, "query_string": b""}, receive, keep)
    return start["status"], bytes(content)
