"""What goes wrong while a run goes on is noticed, noted and shown; what looks like it and is not, is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engine.core.problems import Problem, problem
from engine.core.run_warnings import read_warnings, write_warning
from engine.core.rundir import RunDir, write_json
from engine.runs.runs import Run
from engine.worker.training.loss_watch import LossWatch
from tests.past_runs import falling, run_maker
from webui.runs_tab import head_html
from webui.runs_tab.run_view import stamp_of
from webui.words import Words


@pytest.fixture
def past(tmp_path: Path) -> Callable[..., Run]:
    return run_maker(tmp_path / "saves")


def noticed(losses: Iterable[float], warmup_steps: int = 0) -> list[tuple[str, int]]:
    """(code, step) of what a watch says of these losses, logged at each step from 1 on."""
    watch = LossWatch(warmup_steps)
    answers = (watch.add(step, loss) for step, loss in enumerate(losses, 1))
    return [(answer.code, answer.values["step"]) for answer in answers if answer]


WELL = [line["loss"] for line in falling(40) if "loss" in line]


def test_a_loss_that_falls_or_jumps_for_a_moment_is_left_alone() -> None:
    assert noticed(WELL) == []
    assert noticed([*WELL, 30.0, *WELL[-10:]]) == []
    assert noticed([*WELL, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0]) == []


def test_a_loss_that_stays_far_above_its_best_is_noticed_once() -> None:
    (only,) = noticed([*WELL, *[9.0] * 30])
    assert only[0] == "loss-diverged"
    assert 44 <= only[1] <= 50  # five points, once the smoothing has followed


def test_a_small_loss_that_becomes_three_times_as_large_is_still_small() -> None:
    assert noticed([*WELL, *[0.05] * 20, *[0.5] * 20]) == []


def test_a_large_loss_that_rises_by_more_than_one_has_not_diverged() -> None:
    assert noticed([40.0] * 10 + [60.0] * 20) == []


def test_a_rise_while_the_learning_rate_warms_up_is_waited_out() -> None:
    rising = [*WELL[:3], *[20.0] * 17]
    assert noticed([*rising, *WELL], warmup_steps=20) == []
    assert noticed(rising, warmup_steps=0) != []


def test_a_loss_below_zero_is_held_against_its_size() -> None:
    assert noticed([-5.0] * 10 + [-2.0] * 20) == []
    assert [code for code, _ in noticed([-1.0] * 10 + [4.0] * 20)] == ["loss-diverged"]


def test_a_loss_of_nothing_is_noticed_after_five_points_and_again_if_it_comes_back() -> None:
    assert noticed([0.0] * 9) == [("loss-zero", 5)]
    assert noticed([0.0] * 5 + [1e-9] + [0.0] * 5) == [("loss-zero", 5), ("loss-zero", 11)]


DIVERGED = problem("loss-diverged", "training.learning_rate", step=7, loss="9", best="1")


def test_the_newest_warning_of_each_code_is_read_and_a_spoiled_line_is_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_warnings(run) == []
    write_warning(run, DIVERGED, 7)
    write_warning(run, problem("loss-zero", step=9, count=5), 9)
    write_warning(run, DIVERGED, 11)
    with run.warnings.open("a", encoding="utf-8") as file:
        file.write('{"code": "of-another-version", "field": "", "values": {}, "step": 1, "at": 1}\n{"code": 1}\n')
        file.write('{"code": "loss-zero", "field": "", "values": 3, "step": 1, "at": 1}\n{"half')
    read = [(warning.problem.code, warning.step) for warning in read_warnings(run)]
    assert read == [("loss-zero", 9), ("loss-diverged", 11)]
    assert read_warnings(run)[1].problem == Problem(
        DIVERGED.code, DIVERGED.field, {"step": "7", "loss": "9", "best": "1"}
    )


def test_a_disk_that_is_full_loses_the_warning_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "not there")
    write_warning(run, DIVERGED, 7)
    assert read_warnings(run) == []


def test_the_open_run_shows_what_went_wrong_in_the_readers_language(past: Callable[..., Run]) -> None:
    run = past("a", falling(9))
    assert head_html.cautions(run, Words("en")) == ""
    before = stamp_of(run)
    write_warning(run.dir, DIVERGED, 7)
    assert stamp_of(run) != before  # so that a page that is open asks for it
    assert "lower learning rate" in head_html.cautions(run, Words("en"))
    assert "降低学习率" in head_html.cautions(run, Words("zh"))


def test_what_a_run_has_failed_of_is_not_shown_twice(past: Callable[..., Run]) -> None:
    run = past("a", falling(9), "failed")
    write_warning(run.dir, DIVERGED, 7)
    entry = {"code": DIVERGED.code, "field": DIVERGED.field, "values": dict(DIVERGED.values)}
    write_json(run.dir.error, {"type": "Refusal", "message": "", "problems": [entry]})
    assert "lower learning rate" in head_html.failure(run, Words("en"))
    assert head_html.cautions(run, Words("en")) == ""
