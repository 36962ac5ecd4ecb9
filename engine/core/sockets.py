"""Where this machine listens for others: a socket, and whether more than this machine can knock at it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from engine.core.problems import Refusal, problem

# Longer than a reverse proxy keeps an idle connection (nginx: 60 seconds), so
# that none sends a request into one that closes.
KEEP_ALIVE_SECONDS = 75


def listen(host: str, port: int) -> socket.socket:
    """A socket that strangers may knock at from now on: who comes before there is an answer waits a moment.

    `port` 0 is any that is free. Raises Refusal if somebody else listens there, or nobody can.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise Refusal(
            problem("cannot-listen", host=host, port=port, why=getattr(error, "strerror", None) or error)
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches that address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
