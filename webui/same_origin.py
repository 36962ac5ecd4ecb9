"""Keep other websites from using the studio through a user's browser: an ASGI middleware around the whole app.

A page of another site can make a browser send requests here, with the user's cookies and from the user's machine.
Browsers state where such a request comes from (Origin, Sec-Fetch-Site); programs that are not browsers do not, and are
let through. Without a login, a host name that its owner points to this machine (DNS rebinding) would make another site
look like this one, so the name in Host must be one of ours.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.core.problems import Problem, problem
from webui.reader_language import language_of

# Another port of this host and another name of this domain are "same-site".
FOREIGN_SITES = ("cross-site", "same-site")
FRAMES = "frame-ancestors 'self'"


class SameOrigin:
    """`hosts` are names of the studio in addition to IP addresses and this machine's own name; with `any_host`, Host
    may be anything, because a login protects the studio. Refuses with 403 and a sentence."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = (), *, any_host: bool = False) -> None:
        self.app = app
        self.listed = {host.lower() for host in hosts}
        own = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        self.names = None if any_host else own | self.listed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if refused := self._unknown_host(headers) or self._foreign_origin(scope, headers):
            sentence = refused.text(language_of(HTTPConnection(scope)))
            return await self._refuse(sentence, scope, receive, send)

        async def send_without_frames(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                if "content-security-policy" not in answered:
                    answered["Content-Security-Policy"] = FRAMES
            await send(message)

        return await self.app(scope, receive, send_without_frames)

    def _unknown_host(self, headers: Headers) -> Problem | None:
        """A problem if Host is not a name of this studio."""
        name = _split(f"//{headers.get('host', '')}").hostname or ""
        if self.names is None or name in self.names or _is_address(name):
            return None
        return problem("host-not-ours", host=name[:200] or "—")

    def _foreign_origin(self, scope: Scope, headers: Headers) -> Problem | None:
        """A problem if the request was made by a page of another site. Following a link is allowed."""
        origin = headers.get("origin")
        if origin is not None and not self._is_own(_split(origin), headers):
            return problem("origin-foreign", origin=origin[:200], host=headers.get("host", "")[:200])
        link = scope.get("method") in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if origin is None and headers.get("sec-fetch-site") in FOREIGN_SITES and not link:
            return problem("origin-foreign", origin="—", host=headers.get("host", "")[:200])
        return None

    def _is_own(self, origin: SplitResult, headers: Headers) -> bool:
        """Whether a page of `origin` belongs to this studio. Ports are compared only on this machine, where others also
        listen, because many proxies leave them out of Host."""
        if not origin.hostname:
            return False  # "null": a file, or a frame without a site
        if origin.hostname in self.listed:
            return True
        for name in ("host", "x-forwarded-host"):
            host = _split(f"//{headers.get(name, '').split(',')[0].strip()}")
            if host.hostname == origin.hostname and (not _is_loopback(host.hostname) or host.port == origin.port):
                return True
        return False

    async def _refuse(self, sentence: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse(sentence, 403)(scope, receive, send)


def _split(url: str) -> SplitResult:
    """The parts of a URL; empty ones if it is invalid."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
        return parts
    except ValueError:
        return urlsplit("")


def _is_address(name: str) -> bool:
    """Whether a host is an IP address, which no name server can redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str | None) -> bool:
    return name == "localhost" or (_is_address(name or "") and ipaddress.ip_address(name or "").is_loopback)
