"""Runs and chats on a real Slurm of two machines: submitted, paused, stopped, resumed, killed, and not called dead too
early."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from engine.api.base_models import BaseModel
from engine.api.callers import Caller
from engine.api.chat import Relay
from engine.api.models import Model
from engine.core import audit, hardware, leases
from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_lines, read_object
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.engine_choice import settle_choice
from engine.launch.processes import find_processes
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.mcp.call import Call
from engine.mcp.model_tools import Question, ask_model
from engine.preflight import doctor
from engine.runs import attempts, engines, failures, progress, queue, queue_order, runs, slurm, slurm_queue
from engine.runs.results import new_export_spec
from engine.runs.run import Run
from engine.serving import chat_client, servers, slurm_jobs
from engine.serving.server import Server
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until
from tests.forked import start_forking_process
from tests.hold import hold_at, release
from tests.slurm_cluster import GPUS_SEEN, Cluster, running_cluster
from webui.chat_tab import server_html
from webui.runs_tab import output_html
from webui.words import Words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    start_forking_process()
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def use(cluster: Cluster, patch: pytest.MonkeyPatch) -> None:
    """Let this process ask this Slurm."""
    for name, value in cluster.variables.items():
        patch.setenv(name, value)
    slurm.forget()


@pytest.fixture(scope="module")
def timed_chat(cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A chat whose time limit is over while other tests run: Slurm looks at time limits every half a minute."""
    saves = tmp_path_factory.mktemp("timed")
    (saves / "engine.yaml").write_text("engine: slurm\nchat_sbatch: [--time=10]\n", encoding="utf-8")
    place = Workplace(models=(tiny.parent,), data=saves, saves=saves)
    with pytest.MonkeyPatch.context() as patch:
        use(cluster, patch)
        server = servers.start(place, servers.choose(place, str(tiny)))
        wait_until(server.folder.keeper.exists)
        cluster.command("scontrol", "update", f"jobid={read_object(server.folder.slurm)['job']}", "EndTime=now+10")
    return server


@pytest.fixture
def on_slurm(cluster: Cluster, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A workplace whose runs Slurm starts."""
    use(cluster, monkeypatch)
    assert settle_choice(workplace.saves, "slurm").code == "engine-chosen"
    yield workplace
    hardware.plan_for(None)
    slurm.forget()


def fresh(run: Run) -> Run:
    engines.advance(queue.saves_of(run.path))
    return runs.read(run.path, queue.saves_of(run.path))


def ended(run: Run, seconds: float = 300) -> Run:
    return wait_until(lambda: (now := fresh(run)).final and now, seconds)


def at_step(run: Run, step: int, attempt: int = 1) -> None:
    """Wait until the run has taken that many steps in this attempt."""
    wait_until(
        lambda: (
            read_object(run.dir.keeper).get("attempt") == attempt
            and fresh(run).state == "running"
            and progress.progress(fresh(run)).done >= step
        )
    )


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(run.dir.metrics) if "loss" in line}


def reason(run: Run, language: str = "en") -> str:
    place = engines.place(fresh(run))
    return place.decision.text(language) if place else ""


@pytest.mark.usefixtures("timed_chat")
def test_two_machines_train_like_one_make_room_pause_for_the_time_limit_and_go_on_by_themselves(
    cluster: Cluster, on_slurm: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(training__max_steps=30, logging__save_steps=15, hardware__num_processes=2)
    run = runs.submit(spec.change("hardware.num_machines", 2), on_slurm, by="ada", start=False)
    hold_at(run.dir, 0, "preparing")
    run.dir.pause.write_text("{}", encoding="utf-8")  # of an attempt that Slurm has ended before it began
    engines.advance(on_slurm.saves)
    run = runs.read(run.path, on_slurm.saves)
    job = read_object(run.dir.slurm)["job"]
    wait_until(run.dir.progress.exists)
    assert not run.dir.pause.exists()
    cluster.command("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before a preemption
    wait_until(lambda: "BeginTime" in reason(run) or run.dir.attempt() == 2)
    hold_at(run.dir, 4)  # it must not end before it is paused
    at_step(run, 4, attempt=2)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    wait_until(run.dir.pause.exists)
    hold_at(run.dir, 0, "loading")  # of the next attempt
    wait_until(lambda: "BeginTime" in reason(run) or run.dir.attempt() == 3)
    assert fresh(run).state in ("queued", "preparing")
    paused_at = int(run.dir.checkpoints()[-1].name.rpartition("-")[2])
    release(run.dir)
    assert 4 <= paused_at < 30
    # Meanwhile, the same training on this machine.
    here = replace(on_slurm, saves=on_slurm.saves.parent / "here")
    here.saves.mkdir()
    alone = runs.submit(spec, here)
    assert not alone.dir.on_slurm()
    assert ended(alone).state == "finished"
    run = ended(run)
    assert run.state == "finished", run.dir.log.read_text(encoding="utf-8")[-3000:]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert read_object(run.dir.slurm)["job"] == job
    assert (run.dir.attempt(), attempts.resumed_from(run), run.dir.pause.exists()) == (3, paused_at, False)
    earlier = [RunDir(run.dir.attempts / number) for number in ("1", "2")]
    assert [read_object(attempt.keeper)["attempt"] for attempt in earlier if attempt.pause.exists()] == [1, 2]
    assert attempts.seconds_before(run) > 0
    assert "Loading weights" in (run.path / "log-2.txt").read_text(encoding="utf-8")
    assert "step 30" in run.dir.log.read_text(encoding="utf-8")
    assert "Machine 2" in output_html.logs(run, Words("en"))
    settings = {"data": {"datasets": ["chat"], "max_samples": 2}, "generation": {"max_new_tokens": 4}}
    evaluation = EvaluationSpec.read(settings | {"results": [run.id], "hardware": {"device": "cpu"}})
    specs = new_export_spec(on_slurm, {run.id: 1.0}), evaluation
    for other in [runs.submit(spec, on_slurm) for spec in specs]:
        other = ended(other)
        assert (other.state, other.dir.on_slurm()) == ("finished", True)
    assert len(report.summary(other.dir)["voices"]) == 2  # the base and the run


def test_a_chat_whose_time_is_over_says_so(on_slurm: Workplace, timed_chat: Server) -> None:
    assert noted_end(timed_chat) == "TIMEOUT"
    english, chinese = texts_of(timed_chat)
    assert "TIMEOUT: its time limit was over" in english
    assert "达到时间限制" in chinese


def change_turn(cluster: Cluster, workplace: Workplace, run: Run) -> None:
    """Everything that Slurm can do about the turn of a run that waits for resources."""
    engine(workplace, "queue", run.id, "--hold")
    wait_until(lambda: "JobHeldUser" in reason(run))
    job = read_object(run.dir.slurm)["job"]
    queue_order.set_priority(run, "high")
    with pytest.raises(Refusal, match="held state"):
        queue_order.move(run, "first")
    assert cluster.command("squeue", "--noheader", "--jobs", job, "--format=%r %y") == "JobHeldUser -10000"
    queue_order.release(run)
    wait_until(lambda: "Resources" in reason(run))
    queue_order.set_priority(run, "low")
    assert cluster.command("squeue", "--noheader", "--jobs", job, "--format=%y") == "10000"
    queue_order.move(run, "first")
    with pytest.raises(Refusal, match="Slurm decides the rest"):
        queue_order.start_now(run)


def test_a_run_waits_stops_resumes_outlives_slurmctld_and_a_node_and_is_killed(
    cluster: Cluster, on_slurm: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    blocker = cluster.command(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 99999"
    )
    file = tmp_path / "spec.yaml"
    file.write_text(make_spec(training__max_steps=100_000, logging__save_steps=5).to_yaml(), encoding="utf-8")
    run = runs.get(on_slurm.saves, engine(on_slurm, "submit", str(file)).stdout.strip())
    wait_until(lambda: "Resources" in reason(run))
    assert "空闲的机器或显卡不足" in reason(run, "zh")
    shown = engine(on_slurm, "show", run.id).stdout
    assert "queued" in shown
    assert "Resources" in shown
    change_turn(cluster, on_slurm, run)
    other = runs.submit(make_spec(), on_slurm)
    runs.stop(other, "kill")
    assert runs.read(other.path, on_slurm.saves).state == "stopped"
    runs.delete(other)
    cluster.command("scancel", blocker)
    at_step(run, 5)

    cluster.stop("slurmctld")
    before = max(losses(run))
    doubt = wait_until(lambda: engines.doubt(fresh(run)))
    assert doubt.code == "slurm-silent"
    assert fresh(run).state == "running"
    wait_until(lambda: max(losses(run)) > before + 5)  # the run does not need it
    cluster.start("slurmctld")
    wait_until(lambda: engines.doubt(fresh(run)) is None)
    assert fresh(run).state == "running"

    runs.stop(fresh(run), "save")
    run = ended(run)
    assert run.state == "stopped"
    saved = max(losses(run))
    assert run.dir.checkpoints()[-1].name == f"checkpoint-{saved}"
    old_job = read_object(run.dir.slurm)["job"]
    wait_until(lambda: slurm_queue.left(run.dir) is None, every=0.5)
    assert attempts.resumed_from(run) is None
    runs.resume(run, by="ada")
    at_step(run, saved + 5, attempt=2)
    assert min(step for step in losses(run) if step > saved) == saved + 1
    assert read_object(run.dir.slurm)["job"] != old_job

    node = read_object(run.dir.keeper)["machines"]
    last = int(run.dir.checkpoints()[-1].name.rpartition("-")[2])
    cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    at_step(run, last + 5, attempt=3)  # Slurm has started it again
    assert attempts.resumed_from(run) >= last

    runs.stop(fresh(run), "kill")
    run = ended(run)
    assert run.state == "stopped"
    assert not find_processes(run.path)
    assert (run.exit["attempt"], run.exit["outcome"]) == (3, "stopped")


def test_a_job_that_gets_no_gpu_says_so_and_does_not_compute_on_the_cpu(
    cluster: Cluster, on_slurm: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    (on_slurm.saves / "engine.yaml").write_text("engine: slurm\ngpus_per_machine: 1\ncores: 2\n", encoding="utf-8")
    run = ended(runs.submit(make_spec(hardware__device="auto"), on_slurm))
    assert run.state == "failed"
    why = failures.explain(run)
    assert "submitted for 1 GPU per machine, but sees 0 on n" in why.what()
    assert not run.dir.prepared.exists()
    job = read_object(run.dir.slurm)["job"]
    assert cluster.command("squeue", "--states=all", "--noheader", "--jobs", job, "--format=%C") == "2"  # cores


def test_a_run_that_slurm_does_not_accept_says_why_and_is_submitted_again(
    on_slurm: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    (on_slurm.saves / "engine.yaml").write_text("engine: slurm\npartition: nowhere\n", encoding="utf-8")
    run = runs.submit(make_spec(), on_slurm)
    assert "invalid partition specified: nowhere" in reason(run)
    assert run.state == "queued"
    (on_slurm.saves / "engine.yaml").write_text("engine: slurm\nsbatch: [--hold]\n", encoding="utf-8")
    monkeypatch.setattr(slurm_queue, "RETRY_SECONDS", 0.0)
    wait_until(lambda: "JobHeldUser" in reason(run))
    runs.delete(fresh(run))
    assert not run.path.exists()


ONE, TWO = "demo_model/lora/one", "demo_model/lora/two"


@pytest.fixture
def chats(on_slurm: Workplace, demo_results: Path) -> Workplace:
    """The same, with a model that has a chat template, and two runs of it."""
    shutil.copytree(demo_results, on_slurm.saves, dirs_exist_ok=True)
    return replace(on_slurm, models=(*on_slurm.models, DEMO_MODEL))


def texts_of(server: Server) -> list[str]:
    """What the Chat tab says of a server in English and Chinese."""
    return [server_html.status(server, [], {}, 1.0, Words(language), elsewhere=False) for language in ("en", "zh")]


def noted_end(server: Server) -> str:
    """How Slurm has ended its job, as a studio notes it."""
    noted = server.path / slurm_jobs.ENDED_FILE
    wait_until(lambda: servers.note_ends(server.path.parents[1]) or noted.exists())
    return read_object(noted)["state"]


@contextlib.contextmanager
def slow_sbatch(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Within it, sbatch waits before it does anything; whether it has been called."""
    called, released, program = folder / "called", folder / "released", folder / "bin" / "sbatch"
    waiting = f"touch {called}\nwhile test ! -e {released}; do sleep 0.05; done"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n{waiting}\nexec {shutil.which("sbatch")} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    with patch.context() as within:
        within.setattr(slurm, "COMMAND_LIMIT_SECONDS", 600.0)  # however slow this machine is
        within.setattr(slurm_jobs, "SUBMIT_SECONDS", 600.0)
        within.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        try:
            yield called.exists
        finally:
            released.touch()


def status_without_key(server: Server, path: str) -> int:
    address = read_object(server.path / "address.json")
    connection = http.client.HTTPConnection(address["host"], address["port"], timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def test_a_chat_server_waits_answers_and_loses_its_machine(
    cluster: Cluster, chats: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = cluster.command(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 99999"
    )
    choice = servers.choose(chats, "", [ONE])
    server = servers.start(chats, choice, by="ada")
    english, chinese = wait_until(lambda: "Resources" in (texts := texts_of(server))[0] and texts)
    assert "Waiting for Slurm" in english
    assert "空闲的机器或显卡不足" in chinese
    with monkeypatch.context() as patch:
        patch.setattr(servers, "QUEUE_S", 0.0)
        with pytest.raises(Refusal, match=r"not loaded yet.*Resources.*ask again"):
            servers.wait(server)
    assert servers.start(chats, choice).path == server.path  # it keeps its place in the queue
    first_job = read_object(server.folder.slurm)["job"]
    servers.end(server)
    assert cluster.command("squeue", "--noheader", "--jobs", first_job, "--format=%T") == ""
    assert servers.find(chats.saves, choice) is None

    server = servers.start(chats, choice, by="ada")
    cluster.command("scancel", blocker)
    wait_until(lambda: server.state == "ready")
    job = read_object(server.folder.slurm)["job"]
    assert f"Slurm job {job} on n" in texts_of(server)[0]
    assert read_object(server.path / "address.json")["host"] == "127.0.0.1"  # the node's own, in this cluster
    assert (server.path / "key").stat().st_mode & 0o777 == 0o600
    assert [status_without_key(server, path) for path in ("/v1/models", "/health")] == [401, 200]
    chat_client.add(server, servers.choose(chats, "", [TWO]).adapters)  # as whoever asks another run does
    messages = [{"role": "user", "content": "Translate BSIC Group"}]
    greedy = {"max_tokens": 8, "temperature": 0}
    *_, answers = chat_client.ask(server, dict.fromkeys((server.name, ONE, TWO), messages), greedy)
    assert [(answer.problem, answer.tokens > 0) for answer in answers] == [(None, True)] * 3
    assert len({answer.text for answer in answers}) > 1  # each by its own weights
    body = {"messages": messages, "max_tokens": 4}
    relay = Relay(chats, Model("demo", base=BaseModel("demo", str(DEMO_MODEL))), body, "ada")
    with contextlib.closing(relay):
        relay.open()
        assert (relay.status, json.loads(relay.line())["model"]) == (200, "demo")
    reply = ask_model(Call(chats, Caller(audit.shell("ada"))), Question(question="Hello!", run=TWO, max_tokens=4))
    assert (reply["model"], reply["tokens"] > 0) == (TWO, True)
    node = read_object(server.folder.keeper)["machines"]
    cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    assert noted_end(server) == "NODE_FAIL"
    assert "NODE_FAIL: its machine has failed. Press Restart" in texts_of(server)[0]
    wait_until(lambda: not find_processes(server.path))  # which Slurm ends a moment later
    with pytest.raises(Refusal, match="its machine has failed"):
        chat_client.served_models(server)
    again = servers.start(chats, choice, by="ada")
    assert read_object(again.folder.slurm)["job"] != job
    assert not server.path.exists()
    servers.end(again)
    assert not again.path.exists()


def test_vllm_serves_in_a_job_and_one_that_is_unloaded_while_it_is_submitted_gets_none(
    cluster: Cluster,
    chats: Workplace,
    vllm_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", vllm_path)
    monkeypatch.setenv(GPUS_SEEN, "1")
    (chats.saves / "engine.yaml").write_text("engine: slurm\ngpus_per_machine: 1\n", encoding="utf-8")
    choice = servers.choose(chats, "", [ONE], "vllm")
    with ThreadPoolExecutor(1) as pool, slow_sbatch(tmp_path, monkeypatch) as is_called:
        submitted = pool.submit(servers.start, chats, choice)
        wait_until(is_called)
        unloaded = servers.find(chats.saves, choice)
        servers.end(unloaded)
    with pytest.raises(Refusal, match="was unloaded in the meantime"):
        submitted.result(300)
    wait_until(lambda: cluster.command("squeue", "--noheader", f"--name=athanor-chat-{unloaded.id}") == "")

    server = servers.start(chats, choice)
    servers.wait(server)
    job = read_object(server.folder.slurm)["job"]
    chat_client.add(server, servers.choose(chats, "", [TWO]).adapters)
    assert [model["id"] for model in chat_client.served_models(server)] == [server.name, ONE, TWO]
    assert [status_without_key(server, path) for path in ("/v1/models", "/health")] == [401, 200]
    [inner] = [process for process in find_processes(server.path) if "serve" in process.cmdline()]
    variables = inner.environ()
    assert (variables["CUDA_VISIBLE_DEVICES"], variables.get(leases.HELD_VARIABLE)) == ("0", None)
    assert leases.holders() == {}  # Slurm has given it the GPU
    servers.end(server)
    assert cluster.command("squeue", "--noheader", "--jobs", job, "--format=%T") == ""
    assert not server.path.exists()
    wait_until(lambda: not find_processes(server.path))


def test_a_chat_server_ends_when_it_is_idle_and_does_not_take_the_cpu_for_a_gpu(
    cluster: Cluster, chats: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = servers.choose(chats, str(DEMO_MODEL))
    (chats.saves / "engine.yaml").write_text("engine: slurm\ngpus_per_machine: 1\n", encoding="utf-8")
    server = servers.start(chats, choice)
    wait_until(lambda: server.state == "failed")
    assert "submitted for 1 GPU, but sees 0 on n" in texts_of(server)[0]
    (chats.saves / "engine.yaml").write_text("engine: local\nchats: slurm\nchat_sbatch: [--time=5]\n", encoding="utf-8")
    monkeypatch.setattr(servers, "IDLE_S", 0.1)
    server = servers.start(chats, choice)
    job = read_object(server.folder.slurm)["job"]
    assert cluster.command("squeue", "--states=all", "--noheader", "--jobs", job, "--format=%l") == "5:00"
    wait_until(lambda: server.state == "ended")
    assert not server.problems
    query = "squeue", "--states=all", "--noheader", "--format=%T", "--jobs", job
    wait_until(lambda: cluster.command(*query) == "COMPLETED")
    servers.end(server)
    assert not server.path.exists()
