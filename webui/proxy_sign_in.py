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

from engine.core.problems import Refusal, problem

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ProxySignIn:
    """`header` is its name in requests from `proxies`, addresses or networks. Raises Refusal if one of these is not, or
    is everybody."""

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


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise Refusal(problem("proxy-address", given=text[:80])) from None
    if not network.prefixlen:
        raise Refusal(problem("proxy-address", given=text[:80]))
    return network
