"""The interface as a server of its own, for machines without a studio: `python -m engine api`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from engine.api.app import Api, application
from engine.api.callers import Gate
from engine.core.repetition import repeat
from engine.core.sockets import KEEP_ALIVE_SECONDS
from engine.launch.workspace import Workplace
from engine.runs import engines
from engine.serving import servers

QUEUE_POLL_SECONDS = 2.0
SHUTDOWN_SECONDS = 5  # how long shutting down waits for transfers in progress


def serve(
    workplace: Workplace, users_file: Path, table: Path | None, listener: socket.socket, proxies: Sequence[str] = ()
) -> None:
    """Answer requests until the process is told to end. Runs and chat servers go on without it, as without a studio.
    `proxies`: addresses whose X-Forwarded-For is believed."""
    repeat(lambda: engines.advance(workplace.saves), QUEUE_POLL_SECONDS)
    servers.attend(workplace.saves)
    config = uvicorn.Config(
        application(Api(workplace, Gate(users_file), table)),
        log_level="warning",
        proxy_headers=bool(proxies),  # otherwise, who guesses tokens could have any address
        forwarded_allow_ips=list(proxies),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])
