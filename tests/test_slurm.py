"""Runs on a real Slurm of two machines: submitted, paused, stopped, resumed, killed, and not called dead too early."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_object
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.engine_choice import settle_choice
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.preflight import doctor
from engine.runs import attempts, engines, failures, progress, queue, queue_order, runs, slurm, slurm_queue
from engine.runs.results import new_export_spec
from engine.runs.run import Run
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until
from tests.forked import start_forking_process
from tests.slurm_cluster import Cluster, running_cluster
from webui.runs_tab import output_html
from webui.words import Words

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
    assert "Machine 2" in output_html.logs(run, Words("en"))
    settings = {"data": {"datasets": ["chat"], "max_samples": 2}, "generation": {"max_new_tokens": 4}}
    evaluation = EvaluationSpec.read(settings | {"results": [run.id], "hardware": {"device": "cpu"}})
    specs = new_export_spec(on_slurm, {run.id: 1.0}), evaluation
    for other in [runs.submit(spec, on_slurm) for spec in specs]:
        other = ended(other)
        assert (other.state, other.dir.on_slurm()) == ("finished", True)
    assert len(report.summary(other.dir)["voices"]) == 2  # the base and the run


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


def test_a_job_that_gets_no_gpu_says_so_and_does_not_compute_on_the_cpu(
    on_slurm: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    (on_slurm.saves / "engine.yaml").write_text("engine: slurm\ngpus_per_machine: 1\n", encoding="utf-8")
    run = ended(runs.submit(make_spec(hardware__device="auto"), on_slurm))
    assert run.state == "failed"
    why = failures.explain(run)
    assert "submitted for 1 GPU per machine, but sees 0 on n" in why.what()
    assert not run.dir.prepared.exists()


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
