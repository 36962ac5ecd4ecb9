"""The HTML of the page, built once per address and compressed.

Gradio builds it anew for each visitor: 660 kB, most of it the configuration of all components, sent as it is. It only
depends on the address by which the studio is reached.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

import brotli
from gradio.route_utils import get_root_url
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.studio.assets import QUALITY, reads_brotli

MAX_ADDRESSES = 16  # by which the studio is reached, such as its name and its IP address; 60 kB each
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
        self.pages: OrderedDict[str, tuple[dict[str, str], bytes]] = OrderedDict()  # headers and content by address
        self.building = asyncio.Lock()  # built once for all who ask at the same time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = await self._page(scope, receive) if _asks_for_page(scope) else None
        await (page or self.app)(scope, receive, send)

    async def _page(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer; None if gradio's is anything but a page."""
        request = Request(scope)
        built = await self._built(get_root_url(request, "/", self.root_path or scope.get("root_path")), scope, receive)
        if built is None:
            return None
        headers, content = built
        if reads_brotli(request.headers.get("Accept-Encoding", "")):
            return Response(content, headers=headers | {"content-encoding": "br"})
        return Response(brotli.decompress(content), headers=headers)

    async def _built(self, root: str, scope: Scope, receive: Receive) -> tuple[dict[str, str], bytes] | None:
        async with self.building:
            if root in self.pages:
                self.pages.move_to_end(root)
                return self.pages[root]
            status, headers, content = await _answer(self.app, scope, receive)
            text = content.decode("utf-8", "replace")
            if status != 200 or MODULE_TAG not in text:
                return None
            text = text.replace(MODULE_TAG, PLAIN_EVENTS + MODULE_TAG, 1)
            compressed = await asyncio.to_thread(brotli.compress, text.encode(), brotli.MODE_TEXT, QUALITY)
            self.pages[root] = headers | {"vary": "Accept-Encoding"}, compressed
            while len(self.pages) > MAX_ADDRESSES:
                self.pages.popitem(last=False)
            return self.pages[root]


def _asks_for_page(scope: Scope) -> bool:
    """A deep link of gradio's is a page with values that somebody else has entered."""
    is_page = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/"
    return is_page and b"deep_link" not in scope["query_string"]


async def _answer(app: ASGIApp, scope: Scope, receive: Receive) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and content of an uncompressed answer."""
    start: MutableMapping[str, Any] = {}
    content = bytearray()

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            content.extend(message.get("body", b""))

    plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
    await app({**scope, "headers": plain}, receive, keep)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    headers.pop("content-length", None)
    return start["status"], headers, bytes(content)
