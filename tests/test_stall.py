"""A training that hangs says where it hangs, and is not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.run_warnings import read_warnings
from engine.core.rundir import RunDir, write_json
from engine.launch.workspace import Workplace
from engine.runs import queue, runs
from engine.runs.stall import StallWatch
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until

# A training that takes two steps and then waits for something that never comes.
HANGING = """
import threading, time
from engine.worker.runtime.process_lifecycle import ProgressReport, run_lifecycle

def wait_for_a_card_that_never_answers():
    time.sleep(600)

with run_lifecycle(str(folder)) as run:
    report = ProgressReport(run)
    report("training", 4, 8, "steps")
    time.sleep(0.6)
    report("training", 5, 8, "steps")
    threading.Thread(target=wait_for_a_card_that_never_answers, daemon=True).start()
    threading.Event().wait()
"""


class Clock:
    """Minutes that pass when they are told to."""

    def __init__(self) -> None:
        self.minutes = 100.0

    def __call__(self) -> float:
        return self.minutes * 60


@pytest.fixture
def watched(tmp_path: Path) -> tuple[RunDir, StallWatch, Clock]:
    """A run of which nothing but its progress is there, with a limit of ten minutes."""
    clock = Clock()
    return RunDir(tmp_path), StallWatch(RunDir(tmp_path), 10, clock), clock


def report(run: RunDir, phase: str, done: int, began_with: int = 0) -> None:
    write_json(run.progress, {"phase": phase, "done": done, "began_with": began_with})


def test_a_run_has_stalled_when_nothing_is_written_for_longer_than_the_limit(
    watched: tuple[RunDir, StallWatch, Clock],
) -> None:
    run, watch, clock = watched
    for step in range(1, 4):
        report(run, "training", step)
        watch.look()
        clock.minutes += 9
        watch.look()
    assert read_warnings(run) == []
    clock.minutes += 2
    watch.look()
    watch.look()
    (line,) = run.warnings.read_text(encoding="utf-8").splitlines()
    assert '"run-stalled"' in line
    assert read_warnings(run)[0].step == 3
    report(run, "training", 4)
    watch.look()
    clock.minutes += 11
    watch.look()
    assert len(run.warnings.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("phase", "done"), [("loading", 0), ("training", 5), ("saving", 8)])
def test_what_comes_before_a_first_step_may_take_three_times_as_long(
    watched: tuple[RunDir, StallWatch, Clock], phase: str, done: int
) -> None:
    run, watch, clock = watched
    report(run, phase, done, began_with=done)
    watch.look()
    clock.minutes += 29
    watch.look()
    assert read_warnings(run) == []
    clock.minutes += 2
    watch.look()
    assert len(read_warnings(run)) == 1


def test_a_limit_of_nothing_is_no_limit(tmp_path: Path) -> None:
    clock = Clock()
    watch = StallWatch(RunDir(tmp_path), 0, clock)
    watch.look()
    clock.minutes += 10**6
    watch.look()
    assert read_warnings(RunDir(tmp_path)) == []


def stacks(run: RunDir) -> str:
    return run.stalled.read_text(encoding="utf-8") if run.stalled.exists() else ""


def test_a_training_that_hangs_says_where_and_goes_on_hanging(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, HANGING))
    run = runs.submit(make_spec(logging__stall_minutes=0.01), workplace)
    # On a busy machine, it may have stalled before its first step, too.
    wait_until(lambda: "in wait_for_a_card_that_never_answers" in stacks(run.dir))
    assert "threading.py" in stacks(run.dir)  # what the main thread waits in
    assert {warning.problem.code for warning in read_warnings(run.dir)} == {"run-stalled"}
    assert runs.read(run.path, workplace.saves).state == "running"


def test_a_process_that_offers_no_stack_is_not_ended_by_being_asked(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        queue,
        "supervisor_command",
        lambda folder: stand_in.supervisor_command(folder, "import time; time.sleep(600)"),
    )
    run = runs.submit(make_spec(logging__stall_minutes=0.005), workplace)
    assert "process " not in wait_until(lambda: stacks(run.dir)).split("\n\n", 1)[1]
    assert run.dir.alive()
