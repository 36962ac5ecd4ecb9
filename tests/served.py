"""A server of ours that tests ask, and OpenAI's own client to ask it with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import openai

from engine.core.rundir import read_json
from engine.launch.workspace import Workplace
from engine.serving import servers


@contextlib.contextmanager
def serving(workplace: Workplace, choice: servers.Choice, by: str = "") -> Iterator[servers.Server]:
    """One server for all who only ask; it stays, however slow a test is in between."""
    here = servers.hold_studio_lock(workplace.saves)
    started = servers.start(workplace, choice, by)
    try:
        servers.wait(started)
        yield started
    finally:
        servers.end(started)
        os.close(here)


def client_of(server: servers.Server) -> openai.OpenAI:
    address = read_json(server.path / "address.json")
    key = (server.path / "key").read_text()
    return openai.OpenAI(base_url=f"http://127.0.0.1:{address['port']}/v1", api_key=key, max_retries=0)
