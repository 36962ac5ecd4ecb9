"""Ports of this machine that nobody else is given between when they are chosen and when a server has them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """As many TCP ports, reserved as long as the context lasts.

    Each is bound, so that the system gives it to nobody, and does not listen: connections are refused until a server
    listens there, as one can that permits its address to be used again (SO_REUSEADDR), which all servers do.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for reserving in sockets:
            reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserving.bind(("127.0.0.1", 0))
        yield [reserving.getsockname()[1] for reserving in sockets]
