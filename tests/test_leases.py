"""Leases of GPUs, held and lost by real processes. The machine of the tests has no GPU: `tests.nvml` reports some, and
the trainings on them compute on the CPU."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware, leases
from engine.core.leases import Holder
from engine.core.locks import lock_byte, try_lock
from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import ALIVE_BYTE, read_object, write_json
from engine.launch import command, engine_choice
from engine.launch.processes import memory_in_use
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import doctor
from engine.preflight.idle_gpus import CHECK
from engine.runs import queue, queue_order, runs
from engine.runs.run import Run
from engine.serving import server_gpu, server_process, servers
from engine.serving.server import Server
from engine.spec.run_spec import RunSpec
from tests.conftest import end_runs, wait_until
from tests.nvml import Nvml
from tests.preloaded import run_python

GB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the leases of this test are."""
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(tmp_path / "leases"))
    return tmp_path / "leases"


def close(descriptors: list[int] | None) -> None:
    for descriptor in descriptors or ():
        os.close(descriptor)


def test_all_of_them_or_none(folder: Path) -> None:
    held = leases.take(["GPU-b", "GPU-a"], Holder("tiny/lora/x", "training", by="ada", saves="/saves"))
    assert leases.take(["GPU-c", "GPU-b"], Holder("y", "training")) is None
    assert {uuid: holder.text for uuid, holder in leases.holders().items()} == {
        "GPU-a": "tiny/lora/x (ada)",
        "GPU-b": "tiny/lora/x (ada)",
    }
    close(held)
    assert leases.holders() == {}
    close(leases.take(["GPU-a", "GPU-b", "GPU-c"], Holder("y", "training")))


def test_every_user_of_the_machine_can_use_the_folder_and_no_link_is_followed(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        close(leases.take(["GPU-a"], Holder("x", "training")))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert stat.S_IMODE((folder / "GPU-a").stat().st_mode) == 0o666
    target = folder.parent / "target"
    target.write_text("untouched")
    (folder / "GPU-b").symlink_to(target)
    os.mkfifo(folder / "GPU-c")
    for uuid in ("GPU-b", "GPU-c"):
        with pytest.raises(OSError, match=r"Too many levels|is not a file"):
            leases.take([uuid], Holder("x", "training"))
    assert target.read_text() == "untouched"
    assert [name[-5:] for name in sorted(leases.holders())] == ["GPU-b", "GPU-c"]  # nobody can take them


NONSENSE = ["", "null", '{"what": ["x"], "since": "y"}', "\0" * 5000, '{"what": "cut', "[" * 4096]
NONSENSE += ['{"what": "\\ud800\\u001b[2J"}']


@pytest.mark.parametrize("content", NONSENSE)
def test_whatever_is_written_in_a_lease_the_lock_decides(folder: Path, content: str) -> None:
    held = leases.take(["GPU-a"], Holder("x", "training"))
    (folder / "GPU-a").write_text(content)
    [(uuid, holder)] = leases.holders().items()
    assert (uuid, holder.text.isprintable()) == ("GPU-a", True)
    assert leases.take(["GPU-a"], Holder("y", "training")) is None
    close(held)


def test_what_the_last_holder_was_does_not_let_a_chat_beside_a_run(folder: Path) -> None:
    close(leases.take(["GPU-a"], Holder("m", "chat")))  # its text stays in the file
    setup = os.open(folder / "GPU-a", os.O_RDWR)
    assert lock_byte(setup, leases.SETUP_BYTE, shared=False)  # somebody is taking it, and has not written his text yet
    assert leases.take_beside("GPU-a", Holder("n", "chat")) is None
    assert leases.take(["GPU-a"], Holder("y", "training")) is None
    os.close(setup)
    member = os.open(folder / "GPU-a", os.O_RDWR)  # the last rank of a run whose launcher is gone
    close(leases.take(["GPU-a"], Holder("x", "training")))
    assert lock_byte(member, leases.MEMBER_BYTE, shared=True)
    assert leases.take_beside("GPU-a", Holder("n", "chat")) is None
    assert leases.take(["GPU-a"], Holder("y", "training")) is None
    os.close(member)
    chat = leases.take_beside("GPU-a", Holder("n", "chat"))
    assert leases.holders()["GPU-a"].what == "n"
    close(chat)


def test_a_lock_file_that_was_deleted_meanwhile_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(leases.take(["GPU-a"], Holder("x", "training")))
    opened = leases._open

    def open_and_delete(uuid: str, create: bool = False) -> int:
        descriptor = opened(uuid, create)
        (folder / uuid).unlink()
        (folder / uuid).touch()
        return descriptor

    monkeypatch.setattr(leases, "_open", open_and_delete)
    assert leases.take(["GPU-a"], Holder("y", "training")) is None


def test_a_lease_that_is_being_taken_is_no_free_gpu(folder: Path) -> None:
    close(leases.take(["GPU-a"], Holder("x", "training")))  # its text stays in the file
    setup = os.open(folder / "GPU-a", os.O_RDWR)
    assert lock_byte(setup, leases.SETUP_BYTE, shared=False)  # and so it stays if its process is suspended
    assert leases.holders()["GPU-a"].text == str(folder / "GPU-a")
    os.close(setup)
    assert leases.holders() == {}


JOINS = "from engine.core import leases; print(len(leases.join()), flush=True); input()"


def test_a_process_that_comes_too_late_does_not_join_the_lease_of_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor and the launcher of a run have been killed while a rank of it was being started."""
    owners = ["/saves/m/lora/a", "/saves/m/lora/b"]
    close(leases.take(["GPU-a"], Holder("a", "training", owner=owners[0])))
    held = leases.take(["GPU-a"], Holder("b", "training", by="ada", owner=owners[1]))
    for name, value in leases.environment(["GPU-a"], owners[0]).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", JOINS], cwd=PROJECT, input="", capture_output=True, text=True)
    assert "GPU GPU-a has been leased by b (ada) since the other processes of this run ended" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
    monkeypatch.setenv(leases.OWNER_VARIABLE, owners[1])
    joins = subprocess.Popen([sys.executable, "-c", JOINS], cwd=PROJECT, stdin=-1, stdout=-1)
    assert joins.stdout.readline() == b"1\n"
    close(held)
    assert leases.holders()["GPU-a"].what == "b"
    joins.kill()
    joins.communicate()
    assert leases.holders() == {}


def test_what_deletes_old_files_lets_leases_be(folder: Path) -> None:
    held = leases.take(["GPU-a"], Holder("x", "training"))
    os.utime(folder / "GPU-a", (0, 0))
    leases.keep_touched(["GPU-a", "GPU-gone"])
    assert wait_until(lambda: (folder / "GPU-a").stat().st_mtime) > time.time() - 600
    close(held)


def test_servers_share_a_gpu_with_their_kind_until_the_last_has_ended(folder: Path) -> None:
    first = leases.take(["GPU-a"], Holder("m", "chat"))
    assert leases.take_beside("GPU-a", Holder("x", "training")) is None
    second = leases.take_beside("GPU-a", Holder("n", "chat"))
    close(first)
    assert leases.take(["GPU-a"], Holder("x", "training")) is None
    close(second)
    close(leases.take(["GPU-a"], Holder("x", "training")))


def test_a_lease_lasts_as_long_as_anyone_who_inherited_or_joined_it(folder: Path, monkeypatch: Any) -> None:
    held = leases.take(["GPU-a"], Holder("x", "training"))
    inherits = subprocess.Popen(["sleep", "6000"], pass_fds=held)
    code = "from engine.core import leases; leases.join(); print('joined', flush=True); input()"
    monkeypatch.setenv(leases.HELD_VARIABLE, "GPU-a")
    joins = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdin=-1, stdout=-1)
    assert joins.stdout.readline() == b"joined\n"
    close(held)
    for process in (inherits, joins):
        assert "GPU-a" in leases.holders()
        process.kill()
        process.communicate()
    assert leases.holders() == {}


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture
def four_gpus(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Four GPUs; on the last, somebody else computes."""
    nvml = Nvml(tmp_path / "library", monkeypatch)
    gpus: list[dict[str, Any]] = [{"uuid": f"GPU-{number}", "memory": 80 * GB, "free": 79 * GB} for number in range(4)]
    gpus[3] |= {"free": 40 * GB, "processes": [[1, 39 * GB]]}
    nvml.report(gpus=gpus)
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return nvml


@pytest.fixture
def submit(four_gpus: Nvml, workplace: Workplace, make_spec: Callable[..., RunSpec]) -> Iterator[Callable[..., Run]]:
    """Submit a long training on so many GPUs; what is alive of it in the end is ended."""
    places = [workplace]

    def submit(name: str, count: int = 1, place: Workplace = workplace, **changes: Any) -> Run:
        places.append(place)
        spec = make_spec(
            name=name, hardware__device="auto", hardware__num_processes=count, training__max_steps=100_000, **changes
        )
        return runs.submit(spec, place, by="ada")

    yield submit
    for place in places:
        end_runs(place.saves)


def leased() -> dict[str, str]:
    return {uuid[4:]: holder.what for uuid, holder in leases.holders().items()}


def reason(run: Run) -> str:
    return queue.place(runs.read(run.path, queue.saves_of(run.path))).decision.text()


def test_a_run_has_the_gpus_of_the_studio_that_submitted_it_whoever_starts_it(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace
) -> None:
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        anywhere = submit("anywhere")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        limited = submit("limited")
    monkeypatch.setattr(queue, "_start", lambda run, _lock, gpus: not begun.append([gpu.index for gpu in gpus]))
    for variable in ("", "1"):  # a shell that hides the GPUs, or has others
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        begun.clear()
        queue.advance(workplace.saves)
        assert begun == [[0], [2]], variable
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    write_json(anywhere.dir.request, anywhere.request | {"devices": {"count": "many"}})  # damaged: read from the spec
    assert queue.demand(runs.read(anywhere.path, workplace.saves)).count == 1
    assert queue.demand(limited).allowed == {"GPU-2"}


def test_a_supervisor_that_was_told_no_gpus_finds_them_or_waits(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace
) -> None:
    """As a studio of an older version starts one, after its code has been replaced."""
    with monkeypatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        run = submit("older", 2)
    assert queue.uuids_for(run.dir) == ["GPU-0", "GPU-1"]
    held = leases.take(["GPU-0", "GPU-2"], Holder("x", "training"))
    assert queue.uuids_for(run.dir) is None
    done = subprocess.run(queue.supervisor_command(run.path), cwd=PROJECT, env=queue.supervisor_environment())
    assert done.returncode == queue.GPUS_TAKEN
    assert runs.read(run.path, workplace.saves).state == "queued"
    close(held)


def test_a_start_that_fails_is_tried_again_only_if_something_has_changed(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace, folder: Path
) -> None:
    begun = []
    monkeypatch.setattr(queue, "_start", lambda _run, _lock, gpus: bool(begun.append([gpu.index for gpu in gpus])))
    close(leases.take([f"GPU-{number}" for number in range(4)], Holder("x", "training")))
    setup = os.open(folder / "GPU-0", os.O_RDWR)
    assert lock_byte(setup, leases.SETUP_BYTE, shared=False)
    run = submit("run", 2)
    assert begun == [[1, 2]] * 2  # not the one that a suspended process is taking
    assert reason(run) == ""
    os.close(setup)


def test_a_run_on_the_cpu_leaves_memory_to_one_that_has_not_taken_its_own_yet(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace
) -> None:
    monkeypatch.setenv("ATHANOR_CPU_RUNS", "2")
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    first, second = submit("first"), submit("second")

    def needs(run: Run, memory: int) -> None:
        devices = run.request["devices"] | {"count": 0, "memory": memory}
        write_json(run.dir.request, run.request | {"devices": devices})

    half = int(0.6 * hardware.memory()[0])
    needs(first, half)
    needs(second, half)
    lock = try_lock(first.dir.lock, ALIVE_BYTE, shared=True)
    write_json(first.dir.keeper, {})
    assert reason(second).startswith(f"Needs about {half / 1e9:.1f} GB of memory; ")
    # What it has taken is missing from the free memory already.
    code = "taken = bytearray(b'x') * (200 << 20); print(flush=True); input()"
    environment = os.environ | {command.RUN_VARIABLE: str(first.path)}
    takes = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=-1, stdout=-1)
    assert takes.stdout.readline() == b"\n"
    assert 200 << 20 <= memory_in_use(first.path) < 300 << 20
    needs(first, 200 << 20)
    assert reason(second) == ""
    takes.kill()
    takes.communicate()
    os.close(lock)


def test_who_starts_a_run_where_too_little_memory_is_free_is_warned(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, submit: Callable[..., Run], workplace: Workplace
) -> None:
    begun = []
    monkeypatch.setattr(queue, "_start", lambda _run, _lock, gpus: not begun.append([gpu.index for gpu in gpus]))
    held = leases.take(["GPU-0", "GPU-1", "GPU-2"], Holder("x", "training"))
    run = submit("run")
    write_json(run.dir.request, run.request | {"devices": run.request["devices"] | {"memory": 60 * GB}})
    assert reason(run).endswith("GPU 3: 41.9 GB used by other programs (process 1)")
    assert read_warnings(run.dir) == []
    write_json(run.dir.request, read_object(run.dir.request) | {"resumed_from": 40})
    with monkeypatch.context() as patch:  # another has taken its GPU in the meantime
        patch.setattr(queue, "_start", lambda *_: False)
        queue_order.start_now(run)
    assert read_warnings(run.dir) == []
    queue.advance(workplace.saves)
    assert begun[-1] == [3]
    [warning] = read_warnings(run.dir)
    assert warning.step == 40
    assert "Started where less memory is free than it needs, about 64.4 GB (GPU 3: 42.9 GB)" in warning.problem.text()
    close(held)


def test_a_run_that_fitted_waits_for_a_gpu_that_does_not_respond(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, submit: Callable[..., Run], workplace: Workplace
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    small = {"uuid": "GPU-9", "memory": 1 << 20, "free": 1 << 20}
    four_gpus.report(gpus=[{"uuid": "GPU-0", "memory": 80 * GB, "free": 79 * GB}, small])
    fitted = submit("fitted")
    assert queue.demand(fitted).fits
    four_gpus.report(gpus=[small])
    assert "GB of memory; there are only 0 of that size now. Check nvidia-smi" in reason(fitted)
    runs.delete(fitted)
    assert not queue.demand(submit("tries")).fits  # it never fitted: its owner wants to try it


def test_a_server_gets_another_gpu_if_its_own_was_taken_and_none_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, submit: Callable[..., Run], workplace: Workplace, tiny: Path
) -> None:
    """Its settings are made before its lease is taken: a run may have been faster."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    settings = servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")
    assert settings["card"] == 0
    server = Server(workplace.saves / servers.SERVERS_FOLDER / "x")
    held = leases.take(["GPU-0"], Holder("fast", "training"))
    another, descriptors = server_process._leased(server, settings)
    assert (another["card"], another["gpu"], leased()) == (1, "GPU-1", {"0": "fast", "1": settings["name"]})
    close(descriptors)
    # A run that waits for three GPUs keeps the two that are free. A chat beside a program of somebody else is no worse.
    submit("large", 3)
    engine = workplace.saves / engine_choice.FILE
    engine.write_text("engine: slurm\nchats: local\n")
    assert queue.kept_gpus(workplace.saves) == {}  # it waits for GPUs of other machines
    engine.unlink()
    assert queue.kept_gpus(workplace.saves) == {"GPU-1": "large", "GPU-2": "large"}
    assert servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")["card"] == 3
    monkeypatch.setattr(server_gpu, "weight_bytes", lambda *_: 60e9)
    with pytest.raises(Refusal, match=r"at least 60\.0 GB, but .*: GPU 3: 42\.9 GB\. Unload"):
        servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")
    held += leases.take(["GPU-3"], Holder("y", "training"))
    with pytest.raises(Refusal, match=r"GPU 0: fast \(.*; GPU 1: large; GPU 2: large; GPU 3: y \("):
        server_process._leased(server, settings)
    close(held)


def test_who_has_just_ended_does_not_pass_for_a_program_without_a_lease(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, submit: Callable[..., Run], workplace: Workplace, tiny: Path
) -> None:
    """The driver's answer of a moment before still has the process."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    monkeypatch.setattr(hardware, "QUERY_HOLDS_SECONDS", 600.0)
    monkeypatch.setattr(server_gpu, "weight_bytes", lambda *_: 60e9)
    free, used = {"memory": 80 * GB, "free": 79 * GB}, {"memory": 80 * GB, "free": 40 * GB, "processes": [[4, 39 * GB]]}

    def one_ends(*gpus: dict[str, Any]) -> None:
        hardware.all_gpus()
        answer = hardware._last_query
        four_gpus.report(gpus=[{"uuid": f"GPU-{number}"} | gpu for number, gpu in enumerate(gpus)])
        monkeypatch.setattr(hardware, "_last_query", answer)

    # Two chats share GPU 1. The first ends: a third has room.
    four_gpus.report(gpus=[{"uuid": "GPU-0"} | used, {"uuid": "GPU-1"} | used])
    run, chat = leases.take(["GPU-0"], Holder("x", "training")), leases.take(["GPU-1"], Holder("m", "chat"))
    one_ends(used, free)
    assert servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")["card"] == 1
    # GPU 0 is free, the chat ends, and the run that has waited for both gets them; none that came later does.
    four_gpus.report(gpus=[{"uuid": "GPU-0"} | free, {"uuid": "GPU-1"} | used])
    close(run)
    submit("large", 2)
    submit("small")
    assert queue.kept_gpus(workplace.saves) == {"GPU-0": "large"}
    one_ends(free, free)
    close(chat)
    assert queue.kept_gpus(workplace.saves) == {"GPU-0": "large", "GPU-1": "large"}


def test_a_server_waits_for_a_gpu_on_which_a_package_is_tried(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, workplace: Workplace, tiny: Path
) -> None:
    every = [f"GPU-{number}" for number in range(4)]
    held = leases.take(every[1:], Holder("x", "training")), leases.take(every[:1], Holder("bitsandbytes", CHECK))
    with monkeypatch.context() as patch:
        patch.setattr(server_gpu, "CHECK_SECONDS", -1.0)
        with pytest.raises(Refusal, match=r"GPU 0: bitsandbytes \(.*; GPU 1: x"):
            servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")
    monkeypatch.setattr(server_gpu, "sleep", lambda _: close(held[1]))  # the check ends meanwhile
    assert servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")["card"] == 0
    close(held[0])


def test_without_a_usable_folder_runs_wait_and_say_why(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace, tiny: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        run = submit("waits")
    file = workplace.saves.parent / "no folder"
    file.touch()
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(file))
    queue.advance(workplace.saves)
    assert "cannot be used: part of the path is a file" in reason(run)
    with pytest.raises(Refusal, match="cannot be used"):
        servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "")


def test_a_server_that_cannot_be_started_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, workplace: Workplace, tiny: Path
) -> None:
    choice = servers.choose(workplace, str(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(
            server_process, "write_json", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device"))
        )
        with pytest.raises(Refusal, match="No space left"):
            servers.start(workplace, choice)
    assert leases.holders() == {}
    assert servers.servers(workplace.saves) == []
    assert not list((workplace.saves / servers.SERVERS_FOLDER).glob("[!.]*"))


def test_a_run_that_waits_asks_only_for_gpus_of_servers_that_it_could_use(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace
) -> None:
    monkeypatch.setattr(queue, "_start", lambda *_: True)
    held = [
        *leases.take(["GPU-0"], Holder("m", "chat")),
        *leases.take(["GPU-1"], Holder("big", "vllm")),
        *leases.take(["GPU-2"], Holder("x", "training")),
    ]

    def awaited() -> list[int]:
        return [number for number in range(4) if leases.somebody_waits(f"GPU-{number}")]

    assert awaited() == []
    with monkeypatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        queue_order.hold(submit("held", hardware__devices=[1]))
    submit("chosen", hardware__devices=[0])
    assert awaited() == [0]
    submit("any")
    assert awaited() == [0, 1]
    monkeypatch.setattr(leases, "WAITING_SECONDS", 0.0)
    assert awaited() == []
    close(held)


IDLE_SERVER = """
import asyncio, time
from pathlib import Path
from types import SimpleNamespace
from engine.core import leases
from engine.core.locks import try_lock
from engine.worker.serving import openai_api
studios = Path(leases.folder(), "studios")
lock = try_lock(studios, 0, shared=True)
server = SimpleNamespace(should_exit=False)
settings = {"studios": str(studios), "idle_s": 900, "gpu": "GPU-0"}
generator = SimpleNamespace(fault=lambda: None)
state = SimpleNamespace(
    settings=settings, generator=generator, busy=lambda: False, last_activity=time.monotonic() - 61
)
async def main():
    ending = asyncio.create_task(openai_api._end_when_idle(state, server))
    await asyncio.sleep(1.5)
    print(server.should_exit, flush=True)
    leases.note_waiting("GPU-0")
    await asyncio.wait_for(ending, 60)
    print(server.should_exit)
asyncio.run(main())
"""


@pytest.mark.slow
def test_an_idle_server_ends_for_a_run_that_waits_for_its_gpu(folder: Path) -> None:
    folder.mkdir()
    assert run_python("-c", IDLE_SERVER).split() == ["False", "True"]


def test_hold_release_move_and_priority(
    monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Run], workplace: Workplace
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    for name in "abcd":
        submit(name)

    def order() -> str:
        return "".join(run.facts.name for run in queue.waiting(workplace.saves))

    def run(name: str) -> Run:
        return next(run for run in queue.waiting(workplace.saves) if run.facts.name == name)

    def moved(name: str, where: str) -> str:
        queue_order.move(run(name), where)
        return order()

    assert order() == "abcd"
    assert [moved("c", "up"), moved("c", "up"), moved("c", "up")] == ["acbd", "cabd", "cabd"]
    assert [moved("c", "down"), moved("a", "last"), moved("d", "first")] == ["acbd", "cbda", "dcba"]
    assert [moved("a", "down"), moved("b", "down")] == ["dcba", "dcab"]
    queue_order.set_priority(run("a"), "high")
    queue_order.set_priority(run("d"), "low")
    assert order() == "acbd"
    assert [moved("b", "first"), moved("d", "up"), moved("d", "up")] == ["bacd", "badc", "bdac"]
    queue_order.start_now(run("c"))
    assert order() == "cbda"
    assert moved("b", "up") == "cbda"
    queue_order.hold(run("b"))
    assert reason(run("b")) == "On hold. It stays in the queue until somebody releases it."
    queue_order.release(run("b"))
    assert reason(run("b")) == ""
    for change in (lambda: queue_order.set_priority(run("a"), "urgent"), lambda: moved("a", "sideways")):
        with pytest.raises(Refusal):
            change()
    stopped = run("a")
    runs.stop(stopped, "kill")
    for change in (queue_order.hold, queue_order.release, queue_order.start_now):
        with pytest.raises(Refusal, match="Only a run that is queued has a turn"):
            change(stopped)


def test_while_the_driver_fails_only_runs_on_the_cpu_start(
    monkeypatch: pytest.MonkeyPatch, four_gpus: Nvml, submit: Callable[..., Run], workplace: Workplace
) -> None:
    begun = []
    monkeypatch.setattr(queue, "_start", lambda run, *_: not begun.append(run.path.name[20:]))
    monkeypatch.setattr(
        queue.index, "open_runs", lambda saves: [run for run in runs.find(saves) if run.path.name[20:] not in begun]
    )
    with monkeypatch.context() as patch:
        patch.setattr(queue, "advance", lambda *_: None)
        auto, on_cpu = submit("auto"), submit("cpu", training__precision="fp32")
        write_json(on_cpu.dir.request, on_cpu.request | {"devices": on_cpu.request["devices"] | {"count": 0}})
    four_gpus.report(error="GPU is lost")
    queue.advance(workplace.saves)
    assert begun == ["cpu"]
    assert "GPU is lost" in reason(auto)
    four_gpus.report(gpus=[{"uuid": "GPU-0", "memory": 80 * GB, "free": 79 * GB}])
    queue.advance(workplace.saves)
    assert begun == ["cpu", "auto"]
