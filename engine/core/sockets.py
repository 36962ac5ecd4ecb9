"""Listening sockets, whether an address can be reached from other machines, and which reverse proxies are trusted."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket

from engine.core.problems import Refusal, problem

# Longer than reverse proxies keep idle connections (nginx: 60 seconds), so that none uses a connection that is closing.
KEEP_ALIVE_SECONDS = 75


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: clients that connect before the server answers wait a moment.

    `port` 0 means any free port. Raises Refusal if the address is in use or not available.
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


def reserve_port() -> socket.socket:
    """A socket on a free port of this machine, which is given to nobody else until the socket is closed.

    It does not listen. A server that is told the number still can: like nearly all servers, it binds with SO_REUSEADDR.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def is_loopback(host: str) -> bool:
    """Whether the address can be reached from this machine only."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def add_trusted_proxy_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says whose X-Forwarded-For is believed."""
    environment = os.environ.get
    parser.add_argument(
        "--trusted-proxy",
        metavar="ADDRESS",
        nargs="+",
        action="extend",
        default=environment("ATHANOR_TRUSTED_PROXIES", environment("FORWARDED_ALLOW_IPS", ""))
        .replace(",", " ")
        .split(),
        help=(
            "addresses or networks of reverse proxies whose X-Forwarded-For is trusted; "
            "none by default [ATHANOR_TRUSTED_PROXIES]"
        ),
    )
