"""Ports of this machine that nobody else is given between when they are chosen and when a server has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from engine.core.sockets import reserve_port


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """As many TCP ports, reserved while the context lasts; connections are refused until a server listens there."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(reserve_port()).getsockname()[1] for _ in range(count)]
