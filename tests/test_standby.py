"""The standby: a run that starts in processes that have imported already, and is a run like any other."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.core.locks import try_lock
from engine.core.rundir import ALIVE_BYTE, RunDir, read_json, read_lines
from engine.launch import handover
from engine.launch.command import Step
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import queue, runs, standby, standby_launcher, supervisor
from engine.runs.runs import Run
from engine.runs.standby_launcher import StandbyLauncher
from engine.spec.run_spec import RunSpec
from tests.conftest import command_line, gone, wait_until
from tests.hold import release
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
        pids = {
            process.pid
            for process in living(mark)
            if handover.PLACE in process.words and "engine.worker.launch" in process.words
        }
        with contextlib.suppress(psutil.NoSuchProcess):
            launchers = [psutil.Process(pid) for pid in pids]
            # What one starts has its command line until it is another program.
            launchers = [process for process in launchers if process.ppid() not in pids]
            assert len(launchers) < 2
            return launchers[0] if launchers else None
        return None

    return lambda: wait_until(look)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, workplace: Workplace) -> Iterator[Callable[..., bool]]:
    """This process is a studio at whose form somebody looks: (spec, who it is)."""
    monkeypatch.setattr(standby, "_enabled", True)
    monkeypatch.setattr(standby, "_standby", None)
    monkeypatch.setattr(standby, "_not_before", 0.0)
    monkeypatch.setattr(standby.hardware, "memory", lambda: (16 << 30, 64 << 30))  # with little, there is none
    yield lambda spec, viewer="": standby.offer(spec, workplace, viewer)
    if standby._standby:
        standby._standby.end()


@pytest.fixture
def short(make_spec: Callable[..., RunSpec]) -> RunSpec:
    return make_spec(training__max_steps=3, method__lora_dropout=0.1)


def wait_for_end(*processes: psutil.Process) -> None:
    """Until they have ended, but not as long as until they would because nobody has looked."""
    wait_until(lambda: all(map(gone, processes)), seconds=90)


def supervisor_process() -> psutil.Process:
    return standby._standby._reported()


def ended(run: Run, seconds: float = 120) -> Run:
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
    wait_for_end(first, child)


@slow
def test_a_run_that_is_handed_over_is_the_same_run_and_survives_its_studio(
    workplace: Workplace,
    short: RunSpec,
    tmp_path: Path,
    launcher: Callable[[], psutil.Process],
    hold: Callable[[RunDir, int], None],
) -> None:
    """Real processes, which import while the run begins. It waits at its second step while they are looked at."""
    as_ever = ended(runs.submit(short, workplace))
    studio = start_studio(short, workplace, tmp_path)
    first = psutil.Process(int(studio.stdout.readline()))
    imported = launcher()
    studio.stdin.write("submit\n")
    studio.stdin.flush()
    run = runs.get(workplace.saves, studio.stdout.readline().strip())
    studio.kill()
    studio.wait()
    assert keeper(run) == first.pid
    words = wait_until(lambda: str(run.path) in command_line(imported) and command_line(imported))
    assert_detached(first, run, studio.pid)
    assert str(run.path) in command_line(first)
    assert words[: words.index(str(run.path))][-2:] == ["--module", "engine.worker.train"]
    assert imported in find_processes(run.path)
    release(run.dir)
    assert ended(run).state == "finished"
    assert losses(run) == losses(as_ever)
    assert len(losses(run)) == 3
    assert log(run) == log(as_ever)
    wait_until(lambda: gone(first) and gone(imported))


def assert_detached(process: psutil.Process, run: Run, studio: int) -> None:
    """A supervisor has its own session, our folder, and nothing of the studio."""
    assert os.getsid(process.pid) == os.getpgid(process.pid) != os.getsid(0)
    assert process.ppid() != studio
    assert Path(process.cwd()) == PROJECT
    assert "ATHANOR_RUN" not in process.environ()

    def opened() -> set[str]:
        links = set()
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                links.add(os.readlink(file))
        return links

    places = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert places == [os.devnull, str(run.dir.log), str(run.dir.log)]
    assert str(run.dir.lock) in opened()
    assert not any(path.endswith(".queue.lock") for path in opened())
    # The socket to its launcher is closed when the launcher may begin; another one reserves the port of the run.
    wait_until(lambda: sum(path.startswith("socket:") for path in opened()) == 1, every=0.02)


@slow
def test_it_ends_after_a_while_in_which_nobody_has_looked(
    short: RunSpec, offer: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "IDLE_SECONDS", 1.0)
    offer(short)
    first = supervisor_process()
    assert wait_until(lambda: gone(first))


@slow
@pytest.mark.parametrize(
    ("whom", "how"),
    [
        ("supervisor", "SIGKILL"),
        ("supervisor", "SIGSTOP"),
        ("launcher", "SIGKILL"),
        ("code", "changed"),
        ("run", "of two processes"),
    ],
)
def test_a_run_that_cannot_be_handed_over_has_another_supervisor(
    workplace: Workplace,
    short: RunSpec,
    offer: Callable[..., bool],
    launcher: Callable[[], psutil.Process],
    monkeypatch: pytest.MonkeyPatch,
    whom: str,
    how: str,
) -> None:
    monkeypatch.setattr(standby, "ANSWER_SECONDS", 1.0)
    short = short.change("training.max_steps", 100_000)  # it must not end while it is looked at
    offer(short)
    processes = {"supervisor": supervisor_process(), "launcher": launcher()}
    if whom in processes:
        processes[whom].send_signal(signal.Signals[how])
    elif whom == "code":
        monkeypatch.setattr(standby, "code_stamp", lambda: "as in another version")
    else:
        short = short.change("hardware.num_processes", 2)
    run = runs.submit(short, workplace)
    assert keeper(run) != processes["supervisor"].pid
    assert run.dir.alive()
    wait_for_end(*processes.values())  # the run needs the memory


# ------------------------------------------------------------------------------- whom it waits for, and how long


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby does nothing but wait for its studio to close the channel, and no run starts."""
    monkeypatch.setattr(queue, "supervisor_command", lambda _folder: ["cat"])
    monkeypatch.setattr(queue, "_start", lambda *_: True)


def waiting_run(spec: RunSpec, workplace: Workplace) -> Run:
    """A run that was submitted elsewhere, and that nobody has started yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        return runs.submit(spec, workplace)


def current() -> psutil.Process | None:
    return standby._standby and psutil.Process(standby._standby.starter.pid)


@pytest.mark.parametrize("fault", ["spec", "code", "answer"])
def test_a_standby_prevents_no_start(
    workplace: Workplace,
    short: RunSpec,
    offer: Callable[..., bool],
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a fault")

    offer(short)
    first, run = current(), waiting_run(short, workplace)
    if fault == "spec":
        run.dir.spec.write_bytes(b"name: \xff")
    else:
        monkeypatch.setattr(*{"code": (standby, "code_stamp"), "answer": (handover, "receive")}[fault], fail)
    started = []
    monkeypatch.setattr(queue, "_start", lambda run, *_: started.append(run.path) or True)
    runs.submit(short, workplace)
    assert started == [run.path]
    assert ("UnicodeDecodeError" if fault == "spec" else "a fault") in capfd.readouterr().err
    assert standby._standby is None
    wait_for_end(first)


def test_none_is_started_while_a_run_waits(
    workplace: Workplace, short: RunSpec, offer: Callable[..., bool], stand_in: None
) -> None:
    """Between its submission and its lock, a run is not alive."""
    assert offer(short)
    first, run = current(), waiting_run(short, workplace)
    assert offer(short)
    assert current() == first  # it may be about to be handed that run
    standby._standby.end()
    wait_for_end(first)
    standby._standby = None
    assert not offer(short)
    runs.stop(run, "kill")
    assert offer(short)


def test_it_ends_when_a_run_is_started_elsewhere(
    workplace: Workplace, short: RunSpec, offer: Callable[..., bool], stand_in: None
) -> None:
    offer(short)
    first, run = current(), waiting_run(short, workplace)
    lock = try_lock(run.dir.lock, ALIVE_BYTE, shared=True)
    standby.tick(workplace.saves)
    assert standby._standby is None
    wait_for_end(first)
    assert not offer(short)
    os.close(lock)


def test_a_tick_hands_over_what_waits(
    workplace: Workplace,
    short: RunSpec,
    offer: Callable[..., bool],
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed_over = []
    monkeypatch.setattr(standby.Standby, "take", lambda _, run, _lock, _gpus: not handed_over.append(run.path))
    offer(short)
    run = waiting_run(short, workplace)
    standby.tick(workplace.saves)
    assert handed_over == [run.path]


def test_two_people_do_not_end_each_others(
    short: RunSpec,
    make_spec: Callable[..., RunSpec],
    offer: Callable[..., bool],
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dpo = make_spec(stage={"kind": "dpo"})  # needs other imports
    assert offer(short, "Ann")
    first = current()
    assert offer(short.change("training.learning_rate", 1e-5), "Ann")
    assert not offer(dpo, "Bob")
    assert offer(short, "Ann")
    assert current() == first
    monkeypatch.setattr(standby, "LOOK_SECONDS", 0.0)  # Ann has not looked for longer
    assert offer(dpo, "Bob")
    assert current() != first
    wait_for_end(first)


def test_who_changes_the_form_has_another(
    short: RunSpec,
    make_spec: Callable[..., RunSpec],
    offer: Callable[..., bool],
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dpo = make_spec(stage={"kind": "dpo"})
    offer(short, "Ann")
    offer(short, "Bob")
    first = current()
    assert not offer(dpo, "Ann")
    assert current() == first  # Bob looks at a form that it fits
    assert offer(dpo, "Bob")
    second = current()
    assert second != first
    monkeypatch.setattr(standby, "code_stamp", lambda: "as in another version")
    assert offer(dpo, "Ann")
    assert current() != second
    offer(make_spec(hardware__num_processes=2), "Bob")  # its processes import by themselves
    offer(make_spec(hardware__num_processes=2), "Ann")
    assert standby._standby is None


@pytest.mark.parametrize("idle_seconds", [0, 120])
def test_one_that_has_ended_is_replaced_if_it_was_idle(
    short: RunSpec, offer: Callable[..., bool], stand_in: None, monkeypatch: pytest.MonkeyPatch, idle_seconds: float
) -> None:
    monkeypatch.setattr(standby, "IDLE_SECONDS", idle_seconds)
    offer(short)
    first = current()
    first.kill()
    wait_for_end(first)
    assert offer(short) == (idle_seconds == 0)


def test_each_look_lets_it_wait_as_long_again(
    short: RunSpec, offer: Callable[..., bool], stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, object]] = []
    send, wait = handover.send, select.select
    with monkeypatch.context() as patch:
        patch.setattr(handover, "send", lambda channel, message: sent.append(message) or send(channel, message))
        assert [offer(short) for _ in range(3)] == [True] * 3
    assert sent[1:] == [{"look": True}] * 2
    launcher = StandbyLauncher(Step(["sleep", "600"], waits=True, saves=True))
    studio, end = socket.socketpair()
    for message in sent[1:]:
        send(studio, message)
    send(studio, {"run": "folder", "gpus": ["GPU-0"]}, [studio.fileno()])
    waits: list[float] = []
    monkeypatch.setattr(select, "select", lambda *sockets: waits.append(sockets[-1]) or wait(*sockets))
    folder, uuids, lock = launcher.wait_for_run(end, 100.0)
    os.close(lock)
    assert (folder, uuids, waits) == ("folder", ["GPU-0"], [100.0] * 3)
    with pytest.raises(TimeoutError):
        launcher.wait_for_run(end, 0.01)
    launcher.end()


def test_preparation_does_not_wait_for_a_launcher_that_hangs(
    workplace: Workplace, short: RunSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = waiting_run(short, workplace)
    run.dir.log.touch()
    done = workplace.saves.parent / "done"
    steps = [
        Step(["sh", "-c", f"echo prepared > {done}"], waits=False, saves=False),
        Step(["sh", "-c", f"read line; echo $line >> {done}"], waits=True, saves=True),
    ]
    monkeypatch.setitem(
        supervisor.kinds.KINDS, "training", replace(supervisor.kinds.KINDS["training"], steps=lambda *_: steps)
    )
    monkeypatch.setattr(standby_launcher, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(StandbyLauncher, "fits", lambda *_: True)
    hanging = StandbyLauncher(Step(["sleep", "600"], waits=True, saves=True))
    before = hanging.end
    seen = []
    monkeypatch.setattr(hanging, "end", lambda: seen.append(wait_until(done.exists)) or before())
    supervisor.supervise(RunDir(run.path), launcher=hanging)
    assert seen == [True]  # the supervisor does nothing else until it has been ended
    assert done.read_text() == "prepared\nbegin\n"
    assert capfd.readouterr().out.splitlines() == [f"$ {' '.join(step.arguments)}" for step in steps]
    assert hanging.process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("why", ["no memory", "disabled"])
def test_there_is_none(short: RunSpec, offer: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
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
