"""Chat servers on Slurm without a cluster: who gets a place, a job or a reason, whoever else does what meanwhile. Chats
on a real one: `test_slurm`."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_object, write_json
from engine.launch.engine_choice import EngineChoice
from engine.launch.workspace import Workplace
from engine.runs import slurm, slurm_queue
from engine.serving import servers, slurm_batch, slurm_jobs
from tests.conftest import wait_until
from tests.slurm_commands import stand_in_commands

NAMES = ("tiny", "second", "third")  # of bases


class Commands:
    """Stand-ins for Slurm's commands in `folder`. The first sbatch waits until it is `released`; its job is number 7,
    that of others 8. Jobs wait in the queue until they are cancelled."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.write = folder, stand_in_commands(folder, patch)
        listed = (f"test -e {folder}/cancelled-{job} || echo '{job}|PENDING|Resources|x'" for job in (7, 8))
        self.write(squeue="\n".join(listed), scancel=f"touch {folder}/cancelled-$1")
        # However slow the machine: nothing but the test lets the first sbatch end.
        patch.setattr(slurm, "COMMAND_LIMIT_SECONDS", 600.0)
        patch.setattr(slurm_jobs, "SUBMIT_SECONDS", 600.0)
        self.hold("echo 7")

    def hold(self, end: str) -> None:
        """Let the next sbatch wait, and then do `end`."""
        waiting = f"while test ! -e {self.folder}/released; do sleep 0.05; done\n{end}"
        self.write(sbatch=f"if mkdir {self.folder}/first 2>/dev/null; then\n{waiting}\nelse echo 8; fi")

    def release(self) -> None:
        (self.folder / "released").touch()

    def wait_for_sbatch(self) -> None:
        wait_until((self.folder / "first").exists, every=0.02)

    def calls(self, name: str) -> list[str]:
        """The calls of a command: its first argument."""
        lines = (self.folder / "calls").read_text(encoding="utf-8").splitlines()
        return [words[1] for line in lines if Path((words := line.split())[0]).name == name]


@pytest.fixture
def commands(tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    (workplace.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    yield Commands(tmp_path, monkeypatch)
    slurm.forget()


@pytest.fixture
def chats(workplace: Workplace, tiny: Path, tmp_path: Path) -> Workplace:
    """A workplace with three bases."""
    for name in NAMES[1:]:
        shutil.copytree(tiny, tmp_path / "bases" / name)
    return replace(workplace, models=(tiny.parent, tmp_path / "bases"))


def chosen(chats: Workplace, name: str) -> servers.Choice:
    return servers.choose(chats, str(next(path for root in chats.models if (path := root / name).exists())))


@pytest.fixture
def pool(commands: Commands) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads
        commands.release()  # also of a test that has failed


def test_a_slow_sbatch_keeps_nobody_from_starting_finding_and_unloading_chats(
    commands: Commands, chats: Workplace, pool: ThreadPoolExecutor
) -> None:
    slow = pool.submit(servers.start, chats, chosen(chats, "tiny"), "ada")
    commands.wait_for_sbatch()
    other = servers.start(chats, chosen(chats, "second"), "bob")
    assert read_object(other.folder.slurm)["job"] == "8"
    waiting = servers.find(chats.saves, chosen(chats, "tiny"))
    assert (waiting.state, waiting.waits_for.code) == ("waiting", "slurm-not-yet")
    assert servers.start(chats, chosen(chats, "tiny"), "eve").path == waiting.path
    with pytest.raises(Refusal, match=r"tiny \(ada\); second \(bob\)"):  # its place is taken, job or not
        servers.start(chats, chosen(chats, "third"))
    servers.end(other)
    assert commands.calls("scancel") == ["8"]
    assert not slow.done()
    commands.release()
    assert slow.result(300).path == waiting.path
    assert read_object(waiting.folder.slurm)["job"] == "7"
    assert waiting.waits_for.code == "slurm-waits"
    assert len(commands.calls("sbatch")) == 2


def test_a_slow_scancel_of_a_chat_that_has_ended_delays_only_the_next_of_its_base(
    commands: Commands, chats: Workplace, pool: ThreadPoolExecutor
) -> None:
    commands.release()
    ended = servers.start(chats, chosen(chats, "tiny"))
    write_json(ended.folder.error, {"type": "RuntimeError", "message": "broken"})  # its job has not ended yet
    called, released = commands.folder / "called", commands.folder / "cancel"
    waiting = f"touch {called}\nwhile test ! -e {released}; do sleep 0.05; done"
    commands.write(scancel=f"{waiting}\ntouch {commands.folder}/cancelled-$1")
    again = pool.submit(servers.start, chats, chosen(chats, "tiny"))
    try:
        wait_until(called.exists, every=0.02)
        assert servers.start(chats, chosen(chats, "second")).state == "waiting"
        assert not again.done()
    finally:
        released.touch()
    assert again.result(300).state == "waiting"
    assert not ended.path.exists()


def test_of_many_who_ask_for_a_model_at_once_one_submits_its_job(
    commands: Commands, chats: Workplace, pool: ThreadPoolExecutor
) -> None:
    commands.release()
    started = [*pool.map(lambda _: servers.start(chats, chosen(chats, "tiny")), range(8))]
    assert len({server.path for server in started}) == len(commands.calls("sbatch")) == 1
    assert [server.path for server in servers.servers(chats.saves)] == [started[0].path]


def test_a_chat_that_is_unloaded_while_it_is_submitted_leaves_no_job(
    commands: Commands, chats: Workplace, pool: ThreadPoolExecutor
) -> None:
    slow = pool.submit(servers.start, chats, chosen(chats, "tiny"))
    commands.wait_for_sbatch()
    old = servers.find(chats.saves, chosen(chats, "tiny"))
    servers.end(old)
    assert servers.servers(chats.saves) == []
    again = servers.start(chats, chosen(chats, "tiny"))  # nor does it spoil the next one of this base
    commands.release()
    with pytest.raises(Refusal, match="was unloaded in the meantime"):
        slow.result(300)
    assert commands.calls("scancel") == ["7"]
    assert slurm_batch.serve(old, "7") == 0  # as if it had been started before
    assert [server.path for server in servers.servers(chats.saves)] == [again.path]
    assert (again.state, read_object(again.folder.slurm)["job"]) == ("waiting", "8")


def test_everybody_who_waits_for_a_job_that_slurm_does_not_accept_learns_why(
    commands: Commands, chats: Workplace, pool: ThreadPoolExecutor
) -> None:
    commands.hold("echo 'sbatch: error: invalid partition' >&2; exit 1")
    first = pool.submit(servers.start, chats, chosen(chats, "tiny"))
    commands.wait_for_sbatch()
    second = servers.start(chats, chosen(chats, "tiny"))
    waiting = pool.submit(servers.wait, second)
    commands.release()
    for answer in (first, waiting):
        with pytest.raises(Refusal, match="does not accept the job that would serve tiny: invalid partition"):
            answer.result(300)
    assert slurm_batch.serve(second, "7") == 0  # sbatch may have submitted it all the same
    again = servers.start(chats, chosen(chats, "tiny"))
    assert again.state == "waiting"
    assert [server.path for server in servers.servers(chats.saves)] == [again.path]
    assert read_object(again.folder.slurm)["job"] == "8"


def test_a_job_that_begins_before_the_late_answer_of_sbatch_is_kept(
    commands: Commands, chats: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(_script: str, _options: list[str], _variables: object) -> tuple[None, str]:
        [server] = servers.servers(chats.saves)
        assert slurm_queue.claim(server.folder, "7")
        return None, "sbatch: no answer within 20 s"

    monkeypatch.setattr(slurm, "submit", begin)
    server = servers.start(chats, chosen(chats, "tiny"))
    assert (server.alive, read_object(server.folder.slurm)["job"]) == (True, "7")


def test_a_chat_that_is_being_removed_cannot_be_claimed_and_does_not_stay(
    commands: Commands, chats: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.release()
    removed = servers.start(chats, chosen(chats, "tiny"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if whoever removes it were killed now
        servers.end(removed)
    with pytest.raises(FileNotFoundError):
        slurm_queue.claim(removed.folder, "9")
    assert servers.servers(chats.saves) == []
    again = servers.start(chats, chosen(chats, "tiny"))
    assert {path.name for path in again.path.parent.iterdir()} == {again.id, ".lock"}


def test_a_program_that_is_killed_before_it_has_submitted_a_job_blocks_nobody(
    commands: Commands, chats: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.release()
    left = servers.start(chats, chosen(chats, "tiny"))
    left.folder.slurm.unlink()  # as if it had been killed a moment before
    assert left.state == "waiting"
    monkeypatch.setattr(slurm_jobs, "SUBMIT_SECONDS", -1.0)
    assert left.state == "failed"
    assert "tiny was not submitted to Slurm" in left.problems[0].text()
    for name in NAMES[1:]:  # as many as may be loaded
        assert servers.start(chats, chosen(chats, name)).state == "waiting"
    servers.end(left)
    assert slurm_batch.serve(left, "7") == 0  # as if it had been submitted, but not noted
    assert not left.path.exists()


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T13:00:00 ***", "CANCELLED"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T13:00:00 DUE TO TIME LIMIT ***", "TIMEOUT"),
        ("*** JOB 7 ON n1 CANCELLED AT 2026-11-30T13:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***", "NODE_FAIL"),
        ("Killed", None),
    ],
)
def test_why_a_chat_job_ended_is_known_after_squeue_has_forgotten_it(
    commands: Commands, tmp_path: Path, line: str, cause: str | None
) -> None:
    folder = RunDir(tmp_path / "server")
    folder.path.mkdir()
    write_json(folder.slurm, {"job": "9", "user": "0", "submitted": 1.0})
    folder.log.write_text(f"loading\n{line}\n", encoding="utf-8")
    why = slurm_jobs.why_ended(folder, "tiny")
    assert (why.values["why"] if why else None) == cause
    commands.write(squeue="echo '9|TIMEOUT|TimeLimit|x'")
    assert "time limit was over" in slurm_jobs.why_ended(folder, "tiny").text()


def test_a_studio_notes_how_a_chat_job_has_ended_before_squeue_forgets_it(commands: Commands, chats: Workplace) -> None:
    commands.release()
    server = servers.start(chats, chosen(chats, "tiny"))
    noted = server.path / slurm_jobs.ENDED_FILE
    commands.write(squeue="echo '7|RUNNING|None|x'")
    servers.note_ends(chats.saves)
    assert not noted.exists()
    problems = [{"code": "vllm-died", "field": "", "values": {"name": "tiny"}}]
    write_json(server.folder.error, {"type": "Refusal", "message": "", "problems": problems})
    assert "vLLM, which served tiny, has exited" in server.problems[0].text()  # Slurm ended it a moment earlier
    commands.write(squeue="echo '7|NODE_FAIL|None|x'")
    servers.note_ends(chats.saves)
    commands.write(squeue="exit 1")
    queries = len(commands.calls("squeue"))
    assert "NODE_FAIL: its machine has failed" in server.problems[0].text()
    servers.note_ends(chats.saves)
    assert len(commands.calls("squeue")) == queries  # nobody has to ask again


@pytest.mark.parametrize(
    ("sacct", "why"),
    [
        ("echo PREEMPTED", "a job of higher priority took its place"),
        ("echo 'CANCELLED by 1000'", "somebody has cancelled it"),
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "was killed, or the machine ran out of memory"),
    ],
)
def test_what_no_studio_has_noted_the_accounting_may_know(
    commands: Commands, chats: Workplace, sacct: str, why: str
) -> None:
    commands.release()
    server = servers.start(chats, chosen(chats, "tiny"))
    write_json(server.folder.slurm, read_object(server.folder.slurm) | {"submitted": 1.0})
    commands.write(squeue="", sacct=sacct)
    server.folder.heartbeat.touch()
    for age in (0.0, 60.0):  # a controller that has lost the job; a file system that shows late that it still beats
        os.utime(server.folder.heartbeat, (time.time() - age,) * 2)
        servers.note_ends(chats.saves)
        assert not (server.path / slurm_jobs.ENDED_FILE).exists()
    os.utime(server.folder.heartbeat, (1, 1))
    for _ in range(2):
        servers.note_ends(chats.saves)
    assert why in server.problems[0].text()
    assert len(commands.calls("sacct")) == 1


def test_a_chat_job_gets_what_the_operator_chose_and_no_weights_that_cannot_fit(tmp_path: Path, tiny: Path) -> None:
    choice = EngineChoice(
        engine="slurm",
        gpus_per_machine=8,
        cores=64,
        sbatch=["--qos=high"],
        chat_sbatch=["--partition=chat", "--time=1:00:00"],
    )
    folder = RunDir(tmp_path / "a%b")
    submitted = slurm_jobs.options(folder, {"slurm": slurm_jobs.slurm_settings(choice, str(tiny), {})}, choice)
    assert submitted[-3:] == ["--qos=high", "--partition=chat", "--time=1:00:00"]
    assert {"--gres=gpu:1", "--cpus-per-gpu=8", "--no-requeue", f"--output={tmp_path}/a%%b/log.txt"} <= {*submitted}
    quantized = {"quantization": {"kind": "4bit"}}
    with pytest.raises(Refusal, match=r"weights of tiny take at least .* GB"):
        slurm_jobs.slurm_settings(choice.model_copy(update={"gpu_memory_gb": 1e-6}), str(tiny), quantized)
    on_cpus = EngineChoice(engine="slurm", gpu_memory_gb=1e-6)
    assert slurm_jobs.slurm_settings(on_cpus, str(tiny), {}) == {"gpus": 0}


def test_a_chat_server_listens_where_other_machines_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_batch.address_to_bind("10.0.0.7") == "10.0.0.7"
    assert slurm_batch.address_to_bind("::1") == "::1"
    assert slurm_batch.address_to_bind("localhost") == "0.0.0.0"  # as a name in /etc/hosts may be
    names = {"node1": [(2, 1, 6, "", ("127.0.1.1", 0)), (2, 1, 6, "", ("10.0.0.8", 0))]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_, **__: names[name])
    assert slurm_batch.address_to_bind("node1") == "10.0.0.8"
