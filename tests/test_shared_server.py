"""Ten runs, a chat server and a program of somebody else on one server of eight GPUs, while each of them is killed.

The machine of the tests has no GPU: `tests.nvml` reports them, and the trainings compute on the CPU. All else is real:
a studio, a chat server, and the supervisor, launcher and ranks of each run, which wait after their first step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.core import leases
from engine.core.problems import Refusal
from engine.core.rundir import read_object
from engine.launch.processes import end_processes, find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import doctor
from engine.runs import queue, queue_order, runs
from engine.runs.run import Run
from engine.serving import servers
from engine.spec.run_spec import RunSpec
from tests import hold
from tests.conftest import command_line, end_runs, gone, start_studio, wait_until
from tests.nvml import Nvml

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]
GB = 1 << 30
LAST = 7  # the GPU on which somebody else computes


@dataclass
class Server:
    """The machine: what is reported of its GPUs, and the runs on it."""

    nvml: Nvml
    workplace: Workplace
    make_spec: Callable[..., RunSpec]

    def report(self, others: bool) -> None:
        """Eight empty GPUs; with `others`, process 1 has the larger part of the last."""
        gpus: list[dict[str, Any]] = [{"uuid": f"GPU-{n}", "memory": 80 * GB, "free": 79 * GB} for n in range(8)]
        if others:
            gpus[LAST] |= {"free": 40 * GB, "processes": [[1, 39 * GB]]}
        self.nvml.report(gpus=gpus)

    def submit(self, name: str, count: int, gpus: tuple[int, ...] = (), place: Workplace | None = None) -> Run:
        """Submit a training that waits after its first step, on any `count` GPUs or on these."""
        place = place or self.workplace
        spec = self.make_spec(
            name=name, hardware__device="auto", hardware__devices=gpus, hardware__num_processes=count,
            training__max_steps=1000,
        )  # fmt: skip
        run = runs.submit(spec, place, by="ada", start=False)
        hold.hold_at(run.dir, 1)
        queue.advance(place.saves)
        return runs.read(run.path, place.saves)

    def advance(self) -> None:
        """Let the queue look again, as the studio does every few seconds."""
        queue.advance(self.workplace.saves)

    def comes_to(self, **holders: str) -> None:
        """Wait until these hold GPUs: what was killed lets go of its own a moment later, and then the queue looks."""
        wait_until(lambda: (self.advance(), on_gpus() == holders)[1])


def on_gpus() -> dict[str, str]:
    """Whoever holds GPUs → their numbers."""
    holders: dict[str, str] = {}
    for uuid, holder in sorted(leases.holders().items()):
        holders[holder.what] = holders.get(holder.what, "") + uuid.removeprefix("GPU-")
    return holders


def reason(run: Run) -> str:
    place = queue.place(runs.read(run.path, queue.saves_of(run.path)))
    assert place
    assert place.decision
    return place.decision.text()


def processes(run: Run, program: str) -> list[psutil.Process]:
    return [process for process in find_processes(run.path) if f"engine.{program}" in command_line(process)]


def ranks(run: Run) -> list[psutil.Process]:
    """Those of a run that trains, in their order."""
    wait_until(lambda: read_object(run.dir.progress).get("phase") == "training")
    own = [process for process in processes(run, "worker.train") if "RANK" in process.environ()]
    return sorted(own, key=lambda process: process.environ()["RANK"])


def kill(*killed: psutil.Process) -> None:
    for process in killed:
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: all(map(gone, killed)))


def supervisor(run: Run) -> psutil.Process:
    return psutil.Process(wait_until(lambda: read_object(run.dir.keeper))["pid"])


def kill_all_of(run: Run) -> None:
    """Kill the supervisor, so that it does not act, and then all others, whatever they are doing."""
    kill(supervisor(run))
    while left := find_processes(run.path):
        kill(*left)


@pytest.fixture
def server(
    tmp_path: Path, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(tmp_path / "leases"))
    nvml = Nvml(tmp_path / "library", monkeypatch)
    start = nvml.folder / "sitecustomize.py"
    start.write_text(start.read_text(encoding="utf-8") + hold.START, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(PROJECT), str(nvml.folder))))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    machine = Server(nvml, workplace, make_spec)
    machine.report(others=True)
    yield machine
    for chat in servers.servers(workplace.saves):
        end_processes(chat.path, kill_timeout_s=0)
    end_runs(workplace.saves)


@pytest.fixture
def studio(server: Server) -> Iterator[int]:
    """The pid of a studio for the runs of the server."""
    process, _ = start_studio(server.workplace)
    yield process.pid
    process.kill()
    process.wait()


def submit_ten(server: Server) -> dict[str, Run]:
    """Name → run, in their order."""
    counts = {"four": 4, "two": 2, "three": 3, "single": 1, "pair": 2}
    submitted = {name: server.submit(name, count) for name, count in counts.items()}
    submitted["chosen"] = server.submit("chosen", 1, (LAST,))
    more = {"large": 4, "small": 1, "last": 2, "extra": 3}
    return submitted | {name: server.submit(name, count) for name, count in more.items()}


def kill_the_chat_and_a_rank(server: Server, chat: Path, run: dict[str, Run]) -> None:
    # The chat was first. Two runs fit beside it; the GPU of somebody else's program is left alone.
    assert on_gpus() == {"tiny": "0", "four": "1234", "two": "56"}
    assert "GPU 7: 41.9 GB used by other programs (process 1)" in reason(run["single"])
    assert "GPU 0: tiny (bob); GPU 1: four (ada)" in reason(run["three"])

    # The chat server dies: its GPU is kept for three, the first that waits, and the small run behind may not take it.
    kill(*find_processes(chat))
    server.comes_to(four="1234", two="56")
    assert "GPU 0: kept for three" in reason(run["single"])
    assert "GPU 0: kept for three" in reason(run["pair"])

    # A rank of two dies, and with it the run: three has its GPUs. Nothing is free, so all others wait.
    kill(ranks(run["two"])[-1])
    server.comes_to(four="1234", three="056")
    assert runs.read(run["two"].path, server.workplace.saves).state == "failed"

    # The other program ends. The first that waits takes the GPU, although a later one has asked for just this one.
    server.report(others=False)
    server.comes_to(four="1234", three="056", single="7")
    assert reason(run["chosen"]) == "Needs GPU 7; 0 of 1 are free. GPU 7: single (ada)"


def kill_the_studio_and_a_run_part_by_part(server: Server, studio: int, base: str, run: dict[str, Run]) -> None:
    # The studio dies, then a supervisor, its launcher, and three of four ranks: no GPU is free until the last is gone.
    kill(psutil.Process(studio))
    *most, last = ranks(run["four"])
    kill(supervisor(run["four"]))
    kill(*processes(run["four"], "worker.launch"))
    kill(*most)
    server.advance()
    assert on_gpus() == {"four": "1234", "three": "056", "single": "7"}
    # pair has two of the four; the others are kept for large, which needs four: neither small nor last may have them.
    kill(last)
    server.comes_to(three="056", single="7", pair="12")
    assert runs.read(run["four"].path, server.workplace.saves).state == "interrupted"
    for name in ("small", "last", "extra"):
        assert "GPU 3: kept for large; GPU 4: kept for large" in reason(run[name])
    with pytest.raises(
        Refusal, match=r"kept for a run that waits: .*GPU 3: large; GPU 4: large; .*GPU 7: single \(ada\)"
    ):
        servers.serve_settings(server.workplace, servers.choose(server.workplace, base), "bob")


def look_from_elsewhere(server: Server, saves: Path) -> None:
    # Somebody with a saves folder of his own sees the same leases.
    other = replace(server.workplace, saves=saves)
    other.saves.mkdir()
    foreign = server.submit("foreign", 1, (7,), other)
    assert reason(foreign) == "Needs GPU 7; 0 of 1 are free. GPU 7: single (ada)"
    runs.delete(foreign)


def kill_the_rest(server: Server, run: dict[str, Run]) -> None:
    # All of single dies at once: chosen has the GPU that it asked for.
    kill_all_of(run["single"])
    server.comes_to(three="056", pair="12", chosen="7")

    # A launcher dies, and its supervisor ends the run: large has its four, of five; the last is for small.
    kill(*processes(run["three"], "worker.launch"))
    server.comes_to(pair="12", chosen="7", large="0345", small="6")
    assert runs.read(run["three"].path, server.workplace.saves).state == "failed"
    kill_all_of(run["chosen"])
    server.comes_to(pair="12", large="0345", small="6")
    assert "GPU 7: kept for last" in reason(run["extra"])
    kill_all_of(run["pair"])
    server.comes_to(large="0345", small="6", last="12")

    # Its owner lets extra start now, beside whatever else computes: it comes first, but no lease is shared.
    queue_order.start_now(run["extra"])
    assert on_gpus() == {"large": "0345", "small": "6", "last": "12"}
    kill_all_of(run["small"])
    kill_all_of(run["large"])
    server.comes_to(last="12", extra="034")
    kill_all_of(run["last"])
    kill_all_of(run["extra"])
    server.comes_to()


def test_ten_runs_on_eight_gpus_have_the_schedule_worked_out_by_hand_through_kill_nine(
    server: Server, studio: int, tiny: Path, tmp_path: Path
) -> None:
    chat = servers.start(server.workplace, servers.choose(server.workplace, str(tiny)), by="bob")
    servers.wait(chat)
    run = submit_ten(server)
    kill_the_chat_and_a_rank(server, chat.path, run)
    kill_the_studio_and_a_run_part_by_part(server, studio, str(tiny), run)
    look_from_elsewhere(server, tmp_path / "other")
    kill_the_rest(server, run)
    assert [read_object(each.dir.request)["attempt"] for each in run.values()] == [1] * 10
