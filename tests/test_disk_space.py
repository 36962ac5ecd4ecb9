"""A checkpoint that does not fit: older ones give way, then the training waits, goes on by itself, and still obeys."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core.run_warnings import read_warnings
from engine.core.rundir import RunDir, read_json, write_json
from engine.launch.workspace import Workplace
from engine.runs import progress, runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.process_lifecycle import ProgressReport
from engine.worker.training import disk_space
from engine.worker.training.disk_space import CheckpointSpace
from tests.conftest import end_runs, wait_until
from tests.past_runs import run_maker
from webui.runs_tab import head_html
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

MB = 1 << 20
DISK_MB = 64


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a file system may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, free_mb: float) -> None:
    """Leave so much free, by a file that is made or cut to what that takes."""
    with (disk / "ballast").open("wb") as ballast:
        size = max(disk_space.hardware.free_disk(disk) - int(free_mb * MB), 0)
        if size:
            os.posix_fallocate(ballast.fileno(), 0, size)  # at once, as a run may be writing


def checkpoint(run: RunDir, step: int, size_mb: int = 8) -> str:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_bytes(b"\1" * (size_mb * MB))
    write_json(folder / "complete.json", {"step": step, "done": False})
    return folder.name


class Waiting:
    """The wait of a run on the disk, of which each second of waiting is one call of `meanwhile`."""

    def __init__(self, disk: Path, monkeypatch: pytest.MonkeyPatch):
        (disk / "run").mkdir()
        self.disk, self.run = disk, RunDir(disk / "run")
        self.reported: list[dict[str, Any]] = []  # at each second of waiting
        self.stops = False
        self.meanwhile: Callable[[], None] = lambda: pytest.fail("it waits")
        self.space = CheckpointSpace(self.run, ProgressReport(self.run), lambda flag: flag, lambda: self.stops)
        monkeypatch.setattr(disk_space.time, "sleep", self._sleep)

    def _sleep(self, _seconds: float) -> None:
        self.reported.append(read_json(self.run.progress))
        self.meanwhile()

    def __call__(self, estimate_mb: int = 0, best: str = "") -> bool:
        return self.space.wait(lambda: estimate_mb * MB, 30, 100, best)

    @property
    def phases(self) -> list[str]:
        return [reported["phase"] for reported in self.reported]

    def checkpoints(self) -> list[str]:
        return [folder.name for folder in self.run.checkpoints()]


@pytest.fixture
def waiting(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    return Waiting(disk, monkeypatch)


def test_where_there_is_space_nothing_is_removed_and_nobody_waits(waiting: Waiting) -> None:
    for step in (5, 10, 15):
        checkpoint(waiting.run, step)
    assert waiting()
    assert len(waiting.checkpoints()) == 3
    assert read_warnings(waiting.run) == []


def test_as_few_older_checkpoints_as_possible_give_way_and_never_the_best_or_the_newest(
    waiting: Waiting,
) -> None:
    for step in (5, 10, 15, 20):
        checkpoint(waiting.run, step)
    fill(waiting.disk, 7)  # 8.4 MB and the margin of 4 are needed
    assert waiting(best="checkpoint-5")
    assert waiting.checkpoints() == ["checkpoint-5", "checkpoint-15", "checkpoint-20"]
    (warning,) = read_warnings(waiting.run)
    assert (warning.problem.code, warning.problem.values["names"]) == ("checkpoints-removed", "checkpoint-10")


def test_what_still_does_not_fit_is_waited_for_and_then_goes_on(waiting: Waiting) -> None:
    for step in (5, 10):
        checkpoint(waiting.run, step)
    fill(waiting.disk, 2)
    waiting.meanwhile = lambda: fill(waiting.disk, 2 if len(waiting.phases) < 3 else 13)
    assert waiting()
    assert waiting.phases == ["waiting for space"] * 3
    assert waiting.checkpoints() == ["checkpoint-10"]
    reported = waiting.reported[0]
    assert reported["needed"] == pytest.approx(8.4 * MB + 4 * MB, rel=0.01)
    assert reported["free"] == pytest.approx((2 + 8) * MB, abs=0.2 * MB)


def test_a_first_checkpoint_is_as_large_as_its_weights_and_optimizer_say(waiting: Waiting) -> None:
    fill(waiting.disk, 20)
    assert waiting(estimate_mb=15)
    waiting.meanwhile = lambda: fill(waiting.disk, 40)
    assert waiting(estimate_mb=30)
    assert len(waiting.phases) == 1


def test_a_run_that_is_to_stop_waits_no_longer(waiting: Waiting) -> None:
    checkpoint(waiting.run, 5)
    fill(waiting.disk, 2)

    def stop() -> None:
        waiting.stops = True

    waiting.meanwhile = stop
    assert not waiting()
    assert waiting.checkpoints() == ["checkpoint-5"]


def test_a_disk_with_no_byte_left_does_not_keep_a_run_from_saying_that_it_waits(waiting: Waiting) -> None:
    checkpoint(waiting.run, 5)
    waiting.space.report("training", 29, 100, "steps")
    fill(waiting.disk, 0)
    assert disk_space.hardware.free_disk(waiting.disk) == 0
    waiting.meanwhile = lambda: fill(waiting.disk, 20)
    assert waiting()
    assert waiting.phases == ["waiting for space"]


def test_the_page_says_how_much_is_needed_while_it_waits(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("a", outcome=None)
    alive = replace(run, state="running")
    reported = {
        "phase": "waiting for space",
        "done": 30,
        "total": 100,
        "unit": "steps",
        "began_with": 30,
        "needed": 3 * 10**9,
        "free": 10**9,
    }
    write_json(run.dir.progress, reported)
    assert "needs 3 GB, and 1 GB is free" in head_html.cautions(alive, Words("en"))
    assert "需要 3 GB" in head_html.cautions(alive, Words("zh"))
    assert head_html.cautions(run, Words("en")) == ""  # it was interrupted
    write_json(run.dir.progress, reported | {"phase": "training"})
    assert head_html.cautions(alive, Words("en")) == ""


@pytest.mark.slow
def test_a_training_waits_for_the_disk_goes_on_and_stops_when_told_to(
    workplace: Workplace, make_spec: Callable[..., RunSpec], disk: Path
) -> None:
    place = replace(workplace, saves=disk / "saves")
    place.saves.mkdir()

    def now() -> Run:
        return runs.get(place.saves, run.id)

    def waits_at() -> int:
        reported = progress.progress(now())
        return reported.done if reported.phase == "waiting for space" else 0

    # A single checkpoint: its size is all that can be made free.
    spec = make_spec(training__max_steps=100_000, logging__save_steps=20, logging__save_total_limit=1)
    run = runs.submit(spec, place, start=False)
    try:
        fill(disk, 3)
        runs.queue.advance(place.saves)
        assert wait_until(waits_at) == 20
        assert (now().state, run.dir.checkpoints()) == ("running", [])
        (disk / "ballast").unlink()
        wait_until(lambda: run.dir.checkpoints() and not waits_at())
        fill(disk, 3)
        assert wait_until(waits_at) > 20
        saved = [folder.name for folder in run.dir.checkpoints()]
        runs.stop(now())
        ended = wait_until(lambda: (last := now()).final and last)
        assert ended.state == "stopped"
        assert [folder.name for folder in run.dir.checkpoints()] == saved[-1:]
        assert read_json(run.dir.result() / "result.json")["complete"] is False
    finally:
        end_runs(place.saves)
