"""Sweeps: their runs, their judgement, and what is stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import ALIVE_BYTE, read_json, write_json
from engine.launch.workspace import Workplace
from engine.runs import queue, runs, supervisor, sweep_standing, sweep_watch, sweeps
from engine.runs.outcome import ends_for_good, requested_stop
from engine.runs.run import Run, sweep_of
from engine.runs.slurm_queue import claim
from engine.runs.sweep_standing import Budget, budget
from engine.runs.sweep_watch import SweepWatch
from engine.runs.sweeps import Objective
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until
from tests.slurm_commands import stand_in_commands

LR, RANK = "training.learning_rate", "method.r"


def test_grid_random_and_list(make_spec: Callable[..., RunSpec]) -> None:
    base = make_spec(name="base")
    axes = sweeps.read_axes([f"{LR} = 1e-4, 2e-4 ,3e-4", "", f" {RANK}=8,16"])
    assert axes == {LR: ["1e-4", "2e-4", "3e-4"], RANK: ["8", "16"]}
    grid = sweeps.variants(base, axes, "grid")
    assert [tuple(variant.values.values()) for variant in grid] == [
        ("1e-4", "8"), ("1e-4", "16"), ("2e-4", "8"), ("2e-4", "16"), ("3e-4", "8"), ("3e-4", "16"),
    ]  # fmt: skip
    last = grid[-1].spec
    assert (last.training.learning_rate, last.method.r, last.name) == (3e-4, 16, "base learning_rate=3e-4 r=16")
    drawn = sweeps.variants(base, axes, "random", 4)
    chosen = [tuple(variant.values.values()) for variant in drawn]
    assert len(set(chosen)) == 4
    assert chosen == [tuple(variant.values.values()) for variant in sweeps.variants(base, axes, "random", 4)]
    pairs = sweeps.variants(base, {LR: ["1e-4", "2e-4"], RANK: ["8", "16"]}, "list")
    assert [tuple(variant.values.values()) for variant in pairs] == [("1e-4", "8"), ("2e-4", "16")]


@pytest.mark.parametrize(
    ("lines", "order", "sentence"),
    [
        ([], "grid", "at least one setting"),
        ([f"{LR} ="], "grid", "at least one value"),
        (["learning_rate = 1"], "grid", "does not name a setting"),
        (["data.datasets = a, b"], "grid", "does not name a setting"),
        (["nonsense"], "grid", "does not name a setting"),
        ([f"{RANK} = 8", f"{RANK} = 16"], "grid", "chosen twice"),
        ([f"{LR} = 1e-4, 2e-4", f"{RANK} = 8"], "list", "they have 2, 1"),
        ([f"{LR} = {','.join(['1'] * 5000)}", f"{RANK} = {','.join(['1'] * 5000)}"], "grid", "25,000,000 runs"),
        ([f"{LR} = fast"], "grid", "must be a number"),
        ([f"{RANK} = 8"], "sorted", "grid, random, list"),
    ],
)
def test_what_is_no_sweep_is_refused(
    make_spec: Callable[..., RunSpec], lines: list[str], order: str, sentence: str
) -> None:
    with pytest.raises(Refusal, match=sentence):
        sweeps.variants(make_spec(), sweeps.read_axes(lines), order)


def test_all_runs_are_submitted_or_none(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    base = make_spec(name="base")
    with pytest.raises(Refusal, match=r"With hardware\.num_processes = 999: .*999") as refused:
        sweeps.submit(sweeps.variants(base, {"hardware.num_processes": ["1", "999"]}, "grid"), workplace)
    assert "当 hardware.num_processes = 999 时" in refused.value.problems[0].text("zh")
    variants = sweeps.variants(base, {RANK: ["4"]}, "grid")
    for hours in (0, -1, float("nan"), float("inf")):
        with pytest.raises(Refusal, match="positive number of hours"):
            sweeps.submit(variants, workplace, budget_hours=hours)
    with pytest.raises(Refusal, match="at least one run"):
        sweeps.variants(base, {RANK: ["4", "8"]}, "random", -5)
    assert runs.find(workplace.saves) == []
    first = sweeps.submit(sweeps.variants(base, {RANK: ["4", "8"]}, "grid"), workplace, by="ada", budget_hours=2)
    second = sweeps.submit(sweeps.variants(base, {RANK: ["4", "8"]}, "grid"), workplace)
    assert [run.spec.method.r for run in first] == [4, 8]
    assert sweep_of(first[1])["values"] == {RANK: "8"}
    id = sweep_of(first[0])["id"]
    assert [run.path for run in sweep_standing.members(workplace.saves, id)] == [run.path for run in first]
    assert id != sweep_of(second[0])["id"]
    assert len(sweeps.stop(workplace.saves, id)) == 2
    states = {run.path: run.state for run in runs.find(workplace.saves)}
    assert [states[run.path] for run in (*first, *second)] == ["stopped", "stopped", "queued", "queued"]


def curve(*values: float, name: str = "eval_loss") -> Objective:
    return Objective(name, np.arange(1.0, len(values) + 1), np.array(values))


def test_the_median_rule_by_hand() -> None:
    others = [curve(4, 3, 2, 1, 1), curve(5, 4, 3, 2), curve(6, 6, 6, 6)]
    # Averages of the first four: 2.5, 3.5, 6. A run is stopped if its best value is above 3.5.
    assert sweeps.median_verdict(curve(9, 8, 3.6, 9), others) == (4, 3.6, 3.5)
    assert sweeps.median_verdict(curve(9, 8, 3.5, 9), others) is None
    assert sweeps.median_verdict(curve(9, 9, 9), others) is None  # too early
    assert sweeps.median_verdict(curve(9, 9, 9, 9, 9), others) is None  # only one has come so far
    assert sweeps.median_verdict(curve(9, 9, 9, 9), others[:2]) is None
    higher = [curve(*other.value, name="eval_reward") for other in others]
    assert sweeps.median_verdict(curve(1, 2, 3, 3.4, name="eval_reward"), higher) == (4, 3.4, 3.5)
    assert sweeps.median_verdict(curve(1, 2, 3, 3.6, name="eval_reward"), higher) is None
    assert sweeps.median_verdict(curve(9, 9, 9, 9, name="loss"), others) is None  # another measure


def write_metrics(run: Run, *values: float) -> None:
    lines = [{"step": step, "epoch": 0, "time": step, "loss": value} for step, value in enumerate(values, start=1)]
    run.dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def failing(*_: Any, **__: Any) -> NoReturn:
    raise OSError("a full disk")


def test_a_watch_stops_what_is_hopeless_and_everything_once_the_budget_is_used(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    """Runs as their folders show them; nothing trains."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    variants = sweeps.variants(make_spec(), {RANK: ["1", "2", "4", "8", "16"]}, "grid")
    members, alive = sweeps.submit(variants, workplace, budget_hours=1, early_stop=True), []
    for run, values in zip(members, ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [9, 2.5, 9, 9]), strict=False):
        write_metrics(run, *values)
        write_json(run.dir.keeper, {"started": 1000.0, "leases": ["GPU-0", "GPU-1"]})
        alive.append(try_lock(run.dir.lock, ALIVE_BYTE, shared=True))
    now = 1100.0
    watch = SweepWatch(members[3], lambda: now)

    def stopping() -> list[bool]:
        return [bool(requested_stop(run.dir)) for run in members]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_watch, "pause", failing)
        watch.look()
    assert stopping() == [False] * 5
    assert read_warnings(members[3].dir) == []
    now += 10
    watch.look()  # again, as it has stopped nothing
    assert stopping() == [False, False, False, True, False]
    [warning] = read_warnings(members[3].dir)
    assert (
        warning.problem.values | {"curve": "loss", "step": "4", "value": "2.5", "median": "2"} == warning.problem.values
    )

    watch = SweepWatch(members[0], lambda: now)
    now += 415  # four runs on two GPUs each, for 525 s: 1.17 hours
    training = [runs.read(run.path, workplace.saves) for run in members]
    assert budget(workplace.saves, training, now) == Budget(1, pytest.approx(4 * 2 * 525 / 3600))
    change_request(members[2], beyond_budget=True, attempt=2)  # somebody has resumed it all the same
    watch.look()
    assert stopping() == [True, True, False, True, True]
    for run in (members[0], members[1], members[4]):  # each says why, those that have not begun, too
        assert "has used its 1 GPU hours" in read_warnings(run.dir)[0].problem.text()
    before = runs.read(members[1].path, workplace.saves).request
    now += 60
    watch.look()  # it has done its work
    assert len(members[0].dir.warnings.read_text().splitlines()) == 1
    SweepWatch(members[1], lambda: now).look()  # and another supervisor finds nothing left to stop
    assert runs.read(members[1].path, workplace.saves).request == before
    for run in (members[2], members[4]):  # on Slurm, each supervisor stops its own run
        change_request(run, stop=None)
        claim(run.dir, "7")
        SweepWatch(runs.read(run.path, workplace.saves), lambda: now).look()
        assert read_json(run.dir.request)["stop"] is None
        assert ends_for_good(run.dir) == (run == members[4])
    for lock in alive:
        os.close(lock)
    # Without a process, and without an end: interrupted. What counts is until when it reported progress.
    write_json(members[0].dir.progress, {"at": 1060.0})
    alone = [runs.read(members[0].path, workplace.saves)]
    assert budget(workplace.saves, alone, now).used == pytest.approx(2 * 60 / 3600)


def change_request(run: Run, **changes: Any) -> None:
    write_json(run.dir.request, read_json(run.dir.request) | changes)


def test_a_resumed_run_is_not_judged_but_keeps_the_budget_unless_that_was_used_up_before(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    """Runs as their folders show them; nothing trains."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    variants = sweeps.variants(make_spec(), {RANK: ["1", "2", "4", "8", "16"]}, "grid")
    members = sweeps.submit(variants, workplace, budget_hours=1, early_stop=True)
    began = time.time() - 9000
    for run, values in zip(members, ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [9, 9, 9, 9]), strict=False):
        write_metrics(run, *values)
        write_json(run.dir.keeper, {"started": began, "leases": ["GPU-0"]})
        write_json(run.dir.exit, {"outcome": "failed", "reason": "exit", "ended": began + 360, "attempt": 1})

    def now(place: int) -> Run:
        return runs.read(members[place].path, workplace.saves)

    runs.resume(now(3))  # 0.4 hours are used
    write_json(members[3].dir.keeper, {"started": began + 400, "leases": ["GPU-0"]})
    alive = try_lock(members[3].dir.lock, ALIVE_BYTE, shared=True)
    clock = began + 500.0
    watch = SweepWatch(now(3), lambda: clock)
    watch.look()
    assert (now(3).request["beyond_budget"], now(3).request["stop"], read_warnings(members[3].dir)) == (False, None, [])
    clock = began + 400 + 0.6 * 3600
    watch.look()
    assert [now(place).state for place in (3, 4)] == ["stopping", "stopped"]  # it was stopped, and has stopped another
    os.close(alive)
    write_json(members[3].dir.exit, {"outcome": "stopped", "reason": "stopped", "ended": clock, "attempt": 2})

    runs.resume(now(0))
    assert now(0).request["beyond_budget"]
    assert "resumed all the same" in read_warnings(members[0].dir)[0].problem.text()
    SweepWatch(now(0), lambda: clock).look()
    assert (now(0).state, now(0).request["stop"]) == ("queued", None)


TWO_HOURS_LATER = """
keeper = json.loads((folder / "keeper.json").read_text())
(folder / "keeper.json").write_text(json.dumps(keeper | {"started": keeper["started"] - 7200}))
finish()
"""


def test_what_waits_does_not_begin_once_the_budget_is_used_up(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    """The first ends so soon that its watch may have seen nothing."""
    monkeypatch.setenv("ATHANOR_CPU_RUNS", "1")
    monkeypatch.setattr(
        queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, TWO_HOURS_LATER)
    )
    variants = sweeps.variants(make_spec(), {RANK: ["2", "4", "8"]}, "grid")
    members = sweeps.submit(variants, workplace, budget_hours=1)
    wait_until(lambda: all(run.dir.exit.exists() for run in members))
    states = [runs.read(run.path, workplace.saves).state for run in members]
    assert states == ["finished", "stopped", "stopped"]
    assert [run.dir.keeper.exists() for run in members] == [True, False, False]
    assert "GPU hours" in read_warnings(members[2].dir)[0].problem.text()


DAMAGED_KEEPER = """
keeper = json.loads((folder / "keeper.json").read_text())
(folder / "keeper.json").write_text(json.dumps(keeper | {"leases": 7}))
finish()
"""


def test_the_next_run_begins_even_if_the_use_of_the_budget_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    monkeypatch.setenv("ATHANOR_CPU_RUNS", "1")
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, DAMAGED_KEEPER))
    members = sweeps.submit(sweeps.variants(make_spec(), {RANK: ["2", "4"]}, "grid"), workplace, budget_hours=1)
    wait_until(lambda: all(run.dir.exit.exists() for run in members))
    assert "TypeError" in members[0].dir.log.read_text(encoding="utf-8")  # it was damaged indeed


def test_on_slurm_each_supervisor_stops_its_own_run_and_does_not_begin_beyond_the_budget(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    first, second = sweeps.submit(sweeps.variants(make_spec(), {RANK: ["1", "2"]}, "grid"), workplace, budget_hours=1)
    stand_in_commands(tmp_path, monkeypatch)(squeue="echo '7|RUNNING|None|x'")
    for run in (first, second):
        claim(run.dir, "7")
    write_json(first.dir.keeper, {"started": 1000.0, "leases": ["GPU-0"]})
    SweepWatch(first, lambda: 5000.0).look()
    assert [ends_for_good(run.dir) for run in (first, second)] == [True, False]
    assert read_json(first.dir.request)["stop"] is None  # which only the studio writes
    second.dir.log.touch()
    monkeypatch.setattr(supervisor, "_start", lambda *_: pytest.fail("it has begun"))
    assert supervisor.supervise(second.dir) == -signal.SIGTERM
    assert ends_for_good(second.dir)


def test_what_was_submitted_before_an_error_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    new_folder, count = runs.new_folder, iter(range(3))

    def full_at_the_third(spec: Any, saves: Path) -> Path:
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        return new_folder(spec, saves)

    monkeypatch.setattr(runs, "new_folder", full_at_the_third)
    with pytest.raises(Refusal, match="No space left"):
        sweeps.submit(sweeps.variants(make_spec(), {RANK: ["1", "2", "4"]}, "grid"), workplace)
    assert runs.find(workplace.saves) == []


SLOW_AT_16 = """
import time
rank = int((folder / "spec.yaml").read_text().split(" r: ")[1].split()[0])
for step in range(1, 100_000 if rank == 16 else 200):  # what is to be stopped does not end by itself
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "epoch": 0, "time": step, "loss": rank / step ** 0.5}) + "\\n")
    if step < 6 or rank < 16:
        continue
    if (folder / "pause.json").exists():
        break
    time.sleep(0.1)
finish()
"""


@pytest.mark.slow
def test_the_supervisor_of_a_hopeless_run_stops_it(
    monkeypatch: pytest.MonkeyPatch, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, SLOW_AT_16))
    variants = sweeps.variants(make_spec(), {RANK: ["2", "4", "8", "16"]}, "grid")
    members = sweeps.submit(variants, workplace, early_stop=True)
    last: Any = wait_until(lambda: (run := runs.read(members[-1].path, workplace.saves)).final and run)
    assert [runs.read(run.path, workplace.saves).state for run in members[:3]] == ["finished"] * 3
    assert "median rule" in read_warnings(last.dir)[0].problem.text()
    assert (last.request["stop"], requested_stop(last.dir)) == (None, "save")
    assert len(last.dir.metrics.read_text().splitlines()) < 99_999
