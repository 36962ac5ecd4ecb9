"""Runs that survive: real trainings of a real tiny model, and kill -9 at each of their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.runs import progress, queue, runs
from engine.spec.run_spec import RunSpec
from tests.conftest import command_line, engine, gone, start_studio, wait_until
from tests.hold import release

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]


def fresh(run: runs.Run) -> runs.Run:
    return runs.read(run.path, queue.saves_of(run.path))


def ended(run: runs.Run, seconds: float = 120) -> runs.Run:
    return wait_until(lambda: (now := fresh(run)).final and now, seconds)


def at_step(run: runs.Run, step: int) -> int:
    """Wait until the run has taken that many steps; returns how many it has."""

    def reached() -> int:
        now = fresh(run)
        done = progress.progress(now).done
        return done if now.state == "running" and done >= step else 0

    return wait_until(reached)


def worker(run: runs.Run) -> psutil.Process:
    """A process that trains: the launcher itself where there is one, else the first of its ranks."""
    named = trainers(run)
    ranks = [process for process in named if "engine.worker.launch" not in command_line(process)]
    return (ranks or named)[0]


def trainers(run: runs.Run) -> list[psutil.Process]:
    return [process for process in find_processes(run.path) if "engine.worker.train" in command_line(process)]


def launcher(run: runs.Run) -> psutil.Process:
    return next(one for one in find_processes(run.path) if "engine.worker.launch" in command_line(one))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def steps_logged(run: runs.Run) -> list[int]:
    return [int(step) for step in progress.curves(run)["loss"].step]


@pytest.fixture
def long_spec(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """A training that is still going when it is interrupted."""

    def make(**changes: Any) -> RunSpec:
        return make_spec(training__max_steps=100_000, logging__save_steps=20, method__lora_dropout=0.1, **changes)

    return make


@pytest.mark.usefixtures("not_forked")
def test_a_run_survives_kill_nine_of_the_studio(
    workplace: Workplace, long_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, _ = start_studio(workplace)
    try:
        spec = tmp_path / "spec.yaml"
        spec.write_text(long_spec().to_yaml(), encoding="utf-8")
        run = runs.get(workplace.saves, engine(workplace, "submit", str(spec)).stdout.strip())
        before = at_step(run, 5)
    finally:
        studio.kill()
        studio.wait()
    at_step(run, before + 5)  # it goes on
    monkeypatch.undo()  # who looks from here on may be forked
    studio, _ = start_studio(workplace)
    try:
        assert fresh(run).state == "running"
        steps = steps_logged(run)
        assert steps == list(range(1, steps[-1] + 1))
        assert engine(workplace, "stop", run.id).returncode == 0
        run = ended(run)
    finally:
        studio.kill()
        studio.wait()
    assert run.state == "stopped"
    assert run.dir.checkpoints()[-1].name == f"checkpoint-{steps_logged(run)[-1]}"
    assert run.dir.result() == run.dir.adapter  # stop-and-save leaves something that can be used


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_and_resume_give_the_weights_of_an_uninterrupted_run(
    workplace: Workplace, make_spec: Callable[..., RunSpec], hold: Callable[[RunDir, int], None], ranks: int
) -> None:
    """Dropout is on, so the random state, the optimizer and the place in the data must all come back. That is in the
    midst of an epoch that is not the first, of which each has an order of its own."""
    changes = {
        "training__max_steps": 36, "logging__save_steps": 12, "method__lora_dropout": 0.1,
        "hardware__num_processes": ranks,
    }  # fmt: skip
    whole = ended(runs.submit(make_spec(**changes), workplace))
    assert whole.state == "finished"
    first, last = progress.curves(whole)["loss"].value[[0, -1]]
    assert first > 6  # random weights: ln(800) = 6.7
    assert last < first - 0.7

    broken = runs.submit(make_spec(**changes), workplace, start=False)
    hold(broken.dir, 20)  # it must not end before it is killed
    queue.advance(workplace.saves)
    wait_until(broken.dir.checkpoints, every=0.01)
    launcher(broken).kill()
    broken = ended(broken)
    assert broken.state == "failed"
    assert broken.exit["signal"] == "SIGKILL"
    reached = steps_logged(broken)[-1]
    assert 12 <= reached <= 20
    release(broken.dir)
    runs.resume(broken)
    broken = ended(broken)
    assert broken.state == "finished"
    assert steps_logged(broken) == list(range(1, 37))
    assert weights(broken.dir.adapter) == weights(whole.dir.adapter)
    assert list(progress.curves(broken)["loss"].value) == pytest.approx(list(progress.curves(whole)["loss"].value))


def test_kill_nine_of_the_keeper(
    workplace: Workplace, make_spec: Callable[..., RunSpec], hold: Callable[[RunDir, int], None]
) -> None:
    run = runs.submit(make_spec(training__max_steps=12, logging__save_steps=4), workplace, start=False)
    hold(run.dir, 6)  # it must not end while it is looked at
    queue.advance(workplace.saves)
    at_step(run, 6)
    keeper = psutil.Process(read_json(run.dir.keeper)["pid"])
    keeper.kill()
    wait_until(lambda: gone(keeper))
    assert fresh(run).state == "running"  # the worker lives and holds the lock
    release(run.dir)
    run = ended(run)
    assert run.state == "interrupted"  # nobody saw it end: not "finished"
    runs.resume(run)
    assert ended(run).state == "finished"
    assert steps_logged(run) == list(range(1, 13))


def test_kill_nine_of_the_launcher(workplace: Workplace, long_spec: Callable[..., RunSpec]) -> None:
    run = runs.submit(long_spec(), workplace)
    at_step(run, 3)
    orphan = worker(run)
    launcher(run).kill()
    run = ended(run)
    assert run.state == "failed"
    assert gone(orphan)
    assert find_processes(run.path) == []
    assert "resume" in run.can


def test_stopping_a_run_on_two_ranks_leaves_no_process(workplace: Workplace, long_spec: Callable[..., RunSpec]) -> None:
    run = runs.submit(long_spec(hardware__num_processes=2), workplace)
    at_step(run, 3)
    wait_until(lambda: len(trainers(run)) == 3)  # and not what one of them may be about to start
    runs.stop(fresh(run), "save")
    run = ended(run)
    assert run.state == "stopped"
    assert find_processes(run.path) == []
    assert run.dir.checkpoints()

    runs.resume(run)
    at_step(run, steps_logged(run)[-1] + 2)
    launcher(run).kill()
    with contextlib.suppress(Refusal):  # its supervisor may have ended it already
        runs.stop(fresh(run), "kill")
    run = ended(run)
    assert run.state in ("stopped", "failed")
    assert find_processes(run.path) == []


def test_a_torn_checkpoint_is_not_resumed_from(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    run = ended(runs.submit(make_spec(training__max_steps=9), workplace))
    (run.dir.exit).unlink()  # as if the machine had lost power at the end …
    torn = run.path / "checkpoint-9"
    (torn / "complete.json").unlink()  # … in the middle of the last checkpoint
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    assert fresh(run).state == "interrupted"
    runs.resume(fresh(run))
    run = ended(run)
    assert run.state == "finished"
    assert [one.name for one in run.dir.checkpoints()][-1] == "checkpoint-9"
    assert steps_logged(run) == list(range(1, 10))


def test_the_shell_trains_in_the_foreground(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = tmp_path / "spec.yaml"
    validated = {"data__validation_share": 0.1, "logging__eval_steps": 2, "logging__plot_loss": True}
    spec.write_text(make_spec(training__max_steps=4, **validated).to_yaml())
    done = engine(workplace, "train", str(spec), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[finished]" in done.stdout
    run = runs.find(workplace.saves)[0]
    assert run.dir.plot.stat().st_size > 10_000
    assert {"loss", "eval_loss", "learning_rate", "grad_norm"} <= set(progress.curves(run))
    listed = engine(workplace, "list").stdout
    assert run.id in listed
    assert "finished" in listed
    assert json.loads(engine(workplace, "schema").stdout)["properties"]["method"]


@pytest.fixture(autouse=True)
def _no_stray_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    assert "ATHANOR_RUN" not in os.environ
