"""Ports: one that is reserved is kept from others, and a server that is told it can listen there."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.core.sockets import listen, reserve_port
from engine.launch.workspace import Workplace
from engine.runs import queue, runs
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until


def test_a_reserved_port_is_given_to_nobody_and_a_server_can_listen_there() -> None:
    with reserve_port() as reserved:
        address = reserved.getsockname()
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(address)
        with listen(*address), socket.create_connection(address), pytest.raises(Refusal):
            listen(*address)


def test_the_port_of_a_run_is_kept_while_it_is_prepared(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = tmp_path / "answer"
    source = (
        "import socket\nport = json.loads((folder / 'keeper.json').read_text())['port']\n"
        "try: socket.socket().bind(('127.0.0.1', port)); said = 'free'\nexcept OSError: said = 'taken'\n"
        f"pathlib.Path({str(answer)!r}).write_text(said); finish()"
    )
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, source))
    run = runs.submit(make_spec(), workplace)
    wait_until(lambda: runs.get(workplace.saves, run.id).final)
    assert answer.read_text() == "taken"
