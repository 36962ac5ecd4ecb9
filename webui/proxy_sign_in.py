"""Sign-in by a reverse proxy, which passes on the user's name in a header: an ASGI middleware around everything else.

Anybody can send a header, so the name counts only in requests that come from the proxy itself, by the address of the
connection: this middleware has to be outside of what replaces that by X-Forwarded-For. The login finds the name in
`request.state.proxy_user`, which clients cannot set.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core.problems import Problem, Refusal, problem

MIN_PREFIX = 8  # a network with a shorter prefix is no company's
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ProxySignIn:
    """`header` is its name in requests from `proxies`, addresses or networks. Raises Refusal if one of these is not, or
    is about everybody."""

    def __init__(self, app: ASGIApp, header: str, proxies: Sequence[str]):
        self.app, self.header = app, header.strip().lower().encode("latin-1", "replace")
        self.networks = [_network(text) for text in proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            values = [value for name, value in scope["headers"] if name == self.header]
            others = [(name, value) for name, value in scope["headers"] if name != self.header]
            # Two values: the proxy has added its own to one from the browser.
            user = values[0].decode("utf-8", "replace").strip() if len(values) == 1 and self._trusts(scope) else ""
            scope = {**scope, "headers": others, "state": {**scope.get("state", {}), "proxy_user": user}}
        await self.app(scope, receive, send)

    def _trusts(self, scope: Scope) -> bool:
        """Whether the connection comes from one of the proxies."""
        try:
            address = ipaddress.ip_address((scope.get("client") or ("",))[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None) or address
        return any(mapped in network for network in self.networks)


def proxy_user(connection: Any) -> str:
    """The user whom the proxy has named in a request of starlette or gradio; "" if it has not, or if there is none."""
    return getattr(connection.state, "proxy_user", "")


def loopback_warning(header: str, proxies: Sequence[str]) -> Problem | None:
    """Says that everybody on this machine can send the header, if one of the proxies is on it. Raises Refusal as
    `ProxySignIn` does."""
    local = [text for text in proxies if any(_network(text).overlaps(own) for own in LOOPBACK)]
    return problem("proxy-loopback", given=", ".join(local), header=header) if local else None


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise Refusal(problem("proxy-address", given=text[:80])) from None
    if network.prefixlen < MIN_PREFIX:
        raise Refusal(problem("proxy-address", given=text[:80]))
    return network
