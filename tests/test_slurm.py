"""Runs on a real Slurm of two machines: submitted, paused, stopped, resumed, killed, and not called dead too early."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_object
from engine.launch.engine_choice import EngineChoice, read_choice, settle_choice
from engine.launch.machine import machine_command
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.preflight import checks
from engine.runs import attempts, engines, failures, progress, queue, queue_order, runs, slurm, slurm_batch, slurm_queue
from engine.runs.results import new_export_spec
from engine.runs.run import Run
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until
from tests.forked import start_forking_process
from tests.slurm_cluster import Cluster, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    start_forking_process()
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def on_slurm(cluster: Cluster, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A workplace whose runs Slurm starts."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    slurm.forget()
    assert settle_choice(workplace.saves, "slurm").code == "engine-chosen"
    yield workplace
    hardware.plan_for(None)
    slurm.forget()


def fresh(run: Run) -> Run:
    engines.advance(queue.saves_of(run.path))
    return runs.read(run.path, queue.saves_of(run.path))


def ended(run: Run, seconds: float = 120) -> Run:
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
    lines = map(json.loads, run.dir.metrics.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def reason(run: Run, language: str = "en") -> str:
    place = engines.place(fresh(run))
    return place.decision.text(language) if place else ""


def test_two_machines_train_like_one_pause_for_the_time_limit_and_go_on_by_themselves(
    cluster: Cluster, on_slurm: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(training__max_steps=30, logging__save_steps=15, hardware__num_processes=2)
    run = runs.submit(spec.change("hardware.num_machines", 2), on_slurm, by="ada")
    job = read_object(run.dir.slurm)["job"]
    assert run.state in ("queued", "preparing")
    at_step(run, 3)
    cluster.command("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(lambda: "BeginTime" in reason(run))
    waiting = fresh(run)
    assert (waiting.state, waiting.dir.pause.exists()) == ("queued", True)
    paused_at = int(run.dir.checkpoints()[-1].name.rpartition("-")[2])
    assert 3 <= paused_at < 30
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
    assert (run.dir.attempt(), attempts.resumed_from(run), run.dir.pause.exists()) == (2, paused_at, False)
    first = RunDir(run.dir.attempts / "1")
    assert first.keeper.exists()
    assert first.pause.exists()
    assert attempts.seconds_before(run) > 0
    assert "Loading weights" in (run.path / "log-2.txt").read_text(encoding="utf-8")
    assert "step 30" in run.dir.log.read_text(encoding="utf-8")
    merged = ended(runs.submit(new_export_spec(on_slurm, {run.id: 1.0}), on_slurm))
    assert (merged.state, merged.dir.on_slurm()) == ("finished", True)


def test_a_run_waits_stops_resumes_outlives_slurmctld_and_a_node_and_is_killed(
    cluster: Cluster, on_slurm: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    blocker = cluster.command(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 99"
    )
    file = tmp_path / "spec.yaml"
    file.write_text(make_spec(training__max_steps=100_000, logging__save_steps=5).to_yaml(), encoding="utf-8")
    run = runs.get(on_slurm.saves, engine(on_slurm, "submit", str(file)).stdout.strip())
    wait_until(lambda: "Resources" in reason(run))
    assert "空闲的机器或显卡不足" in reason(run, "zh")
    shown = engine(on_slurm, "show", run.id).stdout
    assert "queued" in shown
    assert "Resources" in shown
    assert not engines.can_be_ordered(run)
    with pytest.raises(Refusal, match="Slurm decides"):
        queue_order.hold(run)
    other = runs.submit(make_spec(), on_slurm)
    runs.stop(other, "kill")
    assert runs.read(other.path, on_slurm.saves).state == "stopped"
    runs.delete(other)
    cluster.command("scancel", blocker)
    at_step(run, 5)

    cluster.stop("slurmctld")
    before = max(losses(run))
    doubt = wait_until(lambda: engines.doubt(fresh(run)), 20)
    assert doubt.code == "slurm-silent"
    assert fresh(run).state == "running"
    wait_until(lambda: max(losses(run)) > before + 5)  # the run does not need it
    cluster.start("slurmctld")
    wait_until(lambda: engines.doubt(fresh(run)) is None, 30)
    assert fresh(run).state == "running"

    runs.stop(fresh(run), "save")
    run = ended(run, 60)
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
    wait_until(lambda: fresh(run).state == "queued")
    at_step(run, last + 5, attempt=3)
    assert attempts.resumed_from(run) >= last

    runs.stop(fresh(run), "kill")
    run = ended(run, 60)
    assert run.state == "stopped"
    assert not find_processes(run.path)
    assert (run.exit["attempt"], run.exit["outcome"]) == (3, "stopped")


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


# ------------------------------------------------------------------------------------------ without a cluster


def test_a_squeue_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("squeue", "sbatch"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\n" + ("exec sleep 60\n" if name == "squeue" else "echo 7\n"), encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "WAIT_LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(slurm, "SQUEUE_LIMIT_SECONDS", 0.5)
    slurm.forget()
    (workplace.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    run = runs.submit(make_spec(), workplace)
    assert read_object(run.dir.slurm)["job"] == "7"
    run.dir.keeper.write_text("{}", encoding="utf-8")  # as if it had been started
    run.dir.heartbeat.touch()
    began = time.monotonic()
    states = {runs.read(run.path, workplace.saves).state for _ in range(20)}
    assert time.monotonic() - began < 3
    assert states == {"preparing"}  # and not dead
    assert "no answer" in engines.doubt(run).text()
    os.utime(run.dir.heartbeat, (0, 0))
    assert runs.read(run.path, workplace.saves).state == "preparing"  # only Slurm can say that it has ended
    slurm.forget()


def test_an_attempt_that_saved_nothing_before_its_time_was_over_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(slurm, "requeue", lambda job: started.append(job) or "")
    monkeypatch.setattr(slurm_batch, "REQUEUE_SECONDS", 0)
    run = RunDir(tmp_path / "saves" / "m" / "lora" / "run")
    run.path.mkdir(parents=True)
    run.request.write_text('{"submitted": 1, "attempt": 1, "kind": "training"}', encoding="utf-8")
    run.pause.write_text("{}", encoding="utf-8")
    slurm_batch._conclude(run, "7", 0, before=0)
    ended_run = runs.read(run.path, tmp_path / "saves")
    assert (ended_run.state, started) == ("failed", [])
    why = failures.explain(ended_run)
    assert "before a checkpoint could be saved" in why.what()
    assert "--time" in why.advice("zh")
    run.exit.unlink()
    (run.path / "checkpoint-4").mkdir()
    (run.path / "checkpoint-4" / "complete.json").write_text("{}", encoding="utf-8")
    slurm_batch._conclude(run, "7", 0, before=0)
    assert (run.exit.exists(), started) == (False, ["7"])
    run.request.write_text('{"submitted": 1, "attempt": 1, "stop": {"how": "save"}}', encoding="utf-8")
    slurm_batch._conclude(run, "7", 0, before=0)  # somebody has stopped it in the meantime
    assert (read_object(run.exit)["outcome"], started) == ("stopped", ["7"])


def test_one_of_two_submissions_wins(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert slurm_queue.claim(run, "3")
    assert not slurm_queue.claim(run, "4")
    assert slurm_queue.claim(run, "3")
    assert read_object(run.slurm)["job"] == "3"


def test_the_answers_of_the_commands_are_parsed() -> None:
    lines = "12|PENDING|QOSMaxJobsPerUserLimit|4294901730|", "13|RUNNING|None|1|n[1-2]", "slurm_load_jobs error|x"
    jobs = slurm.parse_jobs("\n".join([*lines, "1_2|RUNNING|None|1|n1", ""]))
    assert set(jobs) == {"12", "13"}
    assert (jobs["12"].waits, jobs["12"].reason, jobs["13"].alive, jobs["13"].nodes) == (
        True, "QOSMaxJobsPerUserLimit", True, "n[1-2]",
    )  # fmt: skip
    assert [slurm.parse_submitted(text) for text in ("4\n", "warning\n5;cluster\n", "", "x")] == ["4", "5", None, None]
    assert slurm.complaint("sbatch: error: A\nsbatch: error: B\n") == "A; B"
    assert slurm.parse_address("NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=x") == "10.0.0.7"
    kept = slurm.environment({"SLURM_CONF": "f", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "p", "HOME": "h"})
    assert kept == {"SLURM_CONF": "f", "HOME": "h"}
    launch = [sys.executable, "-m", "engine.worker.launch", "--machine_rank", "0", "--module", "m", "folder"]
    assert machine_command(launch, 1, "10.0.0.7")[3:] == [
        "--machine_rank", "0", "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--module", "m", "folder",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("engine: slrum\n", "engine-file-wrong", "slrum"),
        ("engine: slurm\npartitoin: gpu\n", "engine-file-wrong", "partition"),
        ("engine: slurm\ngpus_per_machine: -1\n", "engine-file-wrong", "≥ 0"),
        ("engine: slurm\nsbatch: [-p gpu]\n", "engine-sbatch-option", "-p gpu"),
        ("engine: slurm\nsbatch: ['--wrap=rm -r x']\n", "engine-sbatch-option", "wrap"),
        ('engine: slurm\nsbatch: ["--qos=a\\nb"]\n', "engine-sbatch-option", "qos"),
        ("[", "engine-file-wrong", "Line 2"),
    ],
)
def test_a_wrong_engine_file_says_what_is_wrong(tmp_path: Path, text: str, code: str, words: str) -> None:
    (tmp_path / "engine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refusal) as refused:
        read_choice(tmp_path)
    assert refused.value.problems[0].code == code
    assert words in refused.value.text()
    assert refused.value.text("zh") != refused.value.text()


def test_the_engine_is_chosen_once_for_a_saves_folder(tmp_path: Path) -> None:
    assert settle_choice(tmp_path, None) is None
    assert not (tmp_path / "engine.yaml").exists()
    with pytest.raises(Refusal, match="kubernetes"):
        settle_choice(tmp_path, "kubernetes")
    try:
        assert settle_choice(tmp_path, "slurm").code == "engine-chosen"
        assert settle_choice(tmp_path, "slurm") is None
        with pytest.raises(Refusal, match="slurm"):
            settle_choice(tmp_path, "local")
    finally:
        hardware.plan_for(None)


def test_machines_and_gpus_are_checked_against_the_engine(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    def codes(**changes: Any) -> set[str]:
        spec = make_spec(**{"hardware__device": "auto", **changes})
        return {problem.code for problem in checks.preflight_problems(spec, workplace) + spec_problems(spec)}

    two = {"hardware__num_machines": 2, "hardware__num_processes": 2}
    assert "machines-on-local" in codes(**two)
    assert "machines-uneven" in codes(hardware__num_machines=2)
    assert "machines-with-indices" in codes(**two, hardware__devices=[0, 1])
    choice = EngineChoice(engine="slurm", partition="gpu", sbatch=["--qos=high"], gpus_per_machine=8, gpu_memory_gb=80)
    (workplace.saves / "engine.yaml").write_text(choice.model_dump_json(), encoding="utf-8")
    try:
        settle_choice(workplace.saves, None)
        assert codes(**two) <= {"torch-without-cuda"}  # which is true here
        assert "too-few-cards" in codes(hardware__num_machines=2, hardware__num_processes=32)
        run = Run("a/b/c", tmp_path / "50%", "queued", {}, None)
        words = slurm_queue.options(run, make_spec(**two, hardware__device="auto"), choice)
        assert {"--nodes=2", "--gres=gpu:1", "--partition=gpu", f"--output={tmp_path}/50%%/log.txt"} <= {*words}
        assert words[-1] == "--qos=high"
        assert "--cpus-per-task=2" in slurm_queue.options(run, make_spec(hardware__num_processes=2), choice)
    finally:
        hardware.plan_for(None)
