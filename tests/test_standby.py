"""The standby: a run that starts in processes that have imported already, and is a run like any other."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.core.rundir import read_json, read_lines
from engine.launch import handover
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import queue, runs, standby
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.conftest import command_line, wait_until
from tests.living import living

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable that everything started here inherits."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("STANDBY_TEST", value)
    return f"STANDBY_TEST={value}"


@pytest.fixture
def launcher(mark: str) -> Callable[[], psutil.Process]:
    """Finds the launcher of the standby, once it is there."""

    def look() -> psutil.Process | None:
        pids = [
            process.pid
            for process in living(mark)
            if handover.PLACE in process.words and "engine.worker.launch" in process.words
        ]
        assert len(pids) < 2
        return psutil.Process(pids[0]) if pids else None

    return lambda: wait_until(look, 20)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, workplace: Workplace) -> Iterator[Callable[[RunSpec], None]]:
    """This process is a studio at whose form somebody looks."""
    monkeypatch.setattr(standby, "_enabled", True)
    monkeypatch.setattr(standby, "_standby", None)
    monkeypatch.setattr(standby, "_not_before", 0.0)
    yield lambda spec: standby.offer(spec, workplace)
    if standby._standby:
        standby._standby.end()


@pytest.fixture
def short(make_spec: Callable[..., RunSpec]) -> RunSpec:
    return make_spec(training__max_steps=3, method__lora_dropout=0.1)


def supervisor() -> psutil.Process:
    return standby._standby._reported()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def ended(run: Run, seconds: float = 60) -> Run:
    return wait_until(lambda: (now := runs.read(run.path, queue.saves_of(run.path))).final and now, seconds)


def keeper(run: Run) -> int:
    return wait_until(lambda: read_json(run.dir.keeper))["pid"]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_lines(run.dir.metrics) if "loss" in line]


def log(run: Run) -> list[str]:
    """Its lines without what differs between any two runs: folder, port, speeds, progress bars, prepared rows."""
    text = run.dir.log.read_text(encoding="utf-8").replace(str(run.path), "RUN")
    lines = [line for line in re.split(r"[\r\n]+", text) if "%|" not in line and "prepared before" not in line]
    return [re.sub(r"[\d.]+", "N", line) for line in lines]


@slow
def test_a_run_that_is_handed_over_is_the_same_run(
    workplace: Workplace, short: RunSpec, offer: Callable[[RunSpec], None], launcher: Callable[[], psutil.Process]
) -> None:
    as_ever = ended(runs.submit(short, workplace))
    offer(short)
    first = supervisor()
    imported = launcher()
    # What is not the launcher's business may still change.
    run = runs.submit(short.change("name", "other"), workplace)
    assert keeper(run) == first.pid
    assert str(run.path) in command_line(first)
    words = wait_until(lambda: str(run.path) in command_line(imported) and command_line(imported))
    assert words[: words.index(str(run.path))][-2:] == ["--module", "engine.worker.train"]
    assert imported in find_processes(run.path)
    run = ended(run)
    assert run.state == "finished"
    assert losses(run) == losses(as_ever)
    assert len(losses(run)) == 3
    assert log(run) == log(as_ever)
    assert standby._standby is None
    wait_until(lambda: gone(first) and gone(imported))


def start_studio(spec: RunSpec, workplace: Workplace, folder: Path) -> subprocess.Popen[str]:
    file = folder / "spec.yaml"
    file.write_text(spec.to_yaml(), encoding="utf-8")
    words = [sys.executable, "-m", "tests.offering", file, workplace.models[0], workplace.data, workplace.saves]
    return subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@slow
def test_without_a_run_it_ends_with_its_studio(
    workplace: Workplace, short: RunSpec, tmp_path: Path, launcher: Callable[[], psutil.Process]
) -> None:
    studio = start_studio(short, workplace, tmp_path)
    first = psutil.Process(int(studio.stdout.readline()))
    child = launcher()
    studio.kill()
    studio.wait()
    wait_until(lambda: gone(first) and gone(child), 5)


@slow
def test_with_a_run_it_survives_its_studio(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path, launcher: Callable[[], psutil.Process]
) -> None:
    """Real processes, which import while the run begins."""
    studio = start_studio(make_spec(training__max_steps=100_000), workplace, tmp_path)
    first = psutil.Process(int(studio.stdout.readline()))
    launcher()
    studio.stdin.write("submit\n")
    studio.stdin.flush()
    run = runs.get(workplace.saves, studio.stdout.readline().strip())
    studio.kill()
    studio.wait()
    assert keeper(run) == first.pid
    reached = wait_until(lambda: len(losses(run)))
    wait_until(lambda: len(losses(run)) > reached + 3)
    assert_detached(first, run, studio.pid)
    runs.stop(runs.read(run.path, workplace.saves), "save")
    assert ended(run).state == "stopped"
    wait_until(lambda: gone(first))


def assert_detached(process: psutil.Process, run: Run, studio: int) -> None:
    """A supervisor has its own session, our folder, and nothing of the studio."""
    assert os.getsid(process.pid) == os.getpgid(process.pid) != os.getsid(0)
    assert process.ppid() != studio
    assert Path(process.cwd()) == PROJECT
    assert "ATHANOR_RUN" not in process.environ()
    opened = {os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
    places = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert places == [os.devnull, str(run.dir.log), str(run.dir.log)]
    assert str(run.dir.lock) in opened
    assert not any(path.endswith(".queue.lock") or path.startswith("socket:") for path in opened), opened


@slow
def test_it_ends_after_a_while_in_which_nobody_has_looked(
    short: RunSpec, offer: Callable[[RunSpec], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "IDLE_SECONDS", 1.5)
    offer(short)
    first = supervisor()
    for _ in range(4):
        time.sleep(0.6)
        offer(short)
        assert supervisor() == first
    wait_until(lambda: gone(first), 5)
    time.sleep(0.2)
    offer(short)
    assert supervisor() != first  # somebody has come back


@slow
def test_there_is_one_at_most(
    short: RunSpec, make_spec: Callable[..., RunSpec], offer: Callable[[RunSpec], None]
) -> None:
    offer(short)
    first = supervisor()
    offer(short.change("training.learning_rate", 1e-5))
    assert supervisor() == first
    offer(make_spec(stage={"kind": "dpo"}))  # needs other imports
    second = supervisor()
    assert second != first
    wait_until(lambda: gone(first), 5)
    offer(make_spec(hardware__num_processes=2))  # its processes import by themselves
    assert standby._standby is None
    wait_until(lambda: gone(second), 5)


@slow
@pytest.mark.parametrize(
    ("whom", "how"), [("supervisor", "SIGKILL"), ("supervisor", "SIGSTOP"), ("launcher", "SIGKILL"), ("", "")]
)
def test_a_run_that_cannot_be_handed_over_starts_as_ever(
    workplace: Workplace,
    short: RunSpec,
    offer: Callable[[RunSpec], None],
    launcher: Callable[[], psutil.Process],
    monkeypatch: pytest.MonkeyPatch,
    whom: str,
    how: str,
) -> None:
    monkeypatch.setattr(standby, "ANSWER_SECONDS", 1.0)
    offer(short)
    first = supervisor()
    child = launcher()
    if whom:
        (first if whom == "supervisor" else child).send_signal(signal.Signals[how])
    else:
        monkeypatch.setattr(standby, "code_stamp", lambda: "as in another version")
    run = runs.submit(short, workplace)
    assert keeper(run) != first.pid
    assert ended(run).state == "finished"
    assert len(losses(run)) == 3
    wait_until(lambda: gone(first) and gone(child), 5)


@slow
def test_a_launcher_that_hangs_is_replaced(
    workplace: Workplace, short: RunSpec, offer: Callable[[RunSpec], None], launcher: Callable[[], psutil.Process]
) -> None:
    offer(short)
    first = supervisor()
    child = launcher()
    child.suspend()
    run = runs.submit(short, workplace)
    assert keeper(run) == first.pid
    assert ended(run).state == "finished"
    assert gone(child)


@slow
def test_a_run_that_needs_another_launcher_starts_as_ever(
    workplace: Workplace, short: RunSpec, offer: Callable[[RunSpec], None]
) -> None:
    offer(short)
    first = supervisor()
    run = runs.submit(short.change("hardware.num_processes", 2), workplace)
    assert keeper(run) != first.pid
    wait_until(lambda: gone(first), 5)  # the run needs the memory
    offer(short)
    assert standby._standby is None  # while a run is alive
    runs.stop(runs.read(run.path, workplace.saves), "kill")
    ended(run)


@pytest.mark.parametrize("why", ["no memory", "disabled"])
def test_there_is_none(
    short: RunSpec, offer: Callable[[RunSpec], None], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "disabled":
        monkeypatch.setattr(standby, "_enabled", False)
    else:
        monkeypatch.setattr(standby.hardware, "memory", lambda: (standby.LOW_MEMORY_BYTES - 1, 64 << 30))
    offer(short)
    assert standby._standby is None
    assert not list(standby.findings())


def test_a_message_arrives_with_its_descriptors(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with (tmp_path / "file").open("w") as file:
        handover.send(here, {"text": "line\n\u4e39"}, [file.fileno()])
    handover.send(here, {})
    message, (descriptor,) = handover.receive(there)
    assert message == {"text": "line\n\u4e39"}
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"written")
    os.close(descriptor)
    assert (tmp_path / "file").read_text() == "written"
    assert handover.receive(there) == ({}, [])
    here.close()
    with pytest.raises(EOFError):
        handover.receive(there)


WRITE = """
import sys
from engine.launch import handover
print(handover.has_place(), handover.write_folder("x" * 1025), handover.write_folder(sys.argv[2]), flush=True)
print(handover.has_place(), flush=True)
sys.stdin.read()
"""


def test_a_folder_is_written_where_others_look_for_it() -> None:
    environment = os.environ | {"A": handover.PLACE, "B": f"{handover.PLACE}/more", "C": "last"}
    words = [sys.executable, "-c", WRITE, handover.PLACE, "/saves/模型/run 1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=PROJECT, env=environment, **pipes) as child:
        assert child.stdout.read(len("True False True\nFalse\n")) == b"True False True\nFalse\n"
        shown = psutil.Process(child.pid)
        assert [word for word in shown.cmdline() if word][3:] == ["/saves/模型/run 1"] * 2
        variables = Path(f"/proc/{child.pid}/environ").read_text(encoding="utf-8").split("\0")
        child.stdin.close()
    assert "A=/saves/模型/run 1" in variables
    assert f"B={handover.PLACE}/more" in variables
    assert "C=last" in variables
