"""What a run has logged, as curves: each number in its order, whatever else stands in its line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.runs import progress, runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.past_runs import falling, past_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("tiny/lora/run", tmp_path, "running", {}, None)


def log(run: Run, *lines: dict[str, Any] | str) -> None:
    with run.dir.metrics.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def at(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "time": step * 2.0, **values}


def points(run: Run, name: str) -> list[tuple[float, float]]:
    curve = progress.curves(run)[name]
    return list(zip(curve.step.tolist(), curve.value.tolist(), strict=True))


def test_lines_of_different_kinds_in_turn_keep_the_order_of_each_curve(run: Run) -> None:
    log(run, at(1, loss=9.0), at(2, loss=8.0, grad_norm=1.0), at(2, eval_loss=7.0), at(3, loss=6.0))
    log(run, at(4, grad_norm=2.0, loss=5.0), at(4, eval_loss=4.0), at(5, loss=3.0, grad_norm=3.0))
    assert points(run, "loss") == [(1, 9), (2, 8), (3, 6), (4, 5), (5, 3)]
    assert points(run, "grad_norm") == [(2, 1), (4, 2), (5, 3)]
    assert points(run, "eval_loss") == [(2, 7), (4, 4)]
    assert progress.curves(run)["loss"].time.tolist() == [2, 4, 6, 8, 10]


def test_only_new_whole_lines_are_taken_and_a_spoiled_one_is_passed_over(run: Run) -> None:
    log(run, at(1, loss=9.0), "spoiled\n", at(2, loss=8.0), '{"step": 3, "epo')
    assert points(run, "loss") == [(1, 9), (2, 8)]
    log(run, 'ch": null, "time": 6.0, "loss": 7.0}\n')
    assert points(run, "loss") == [(1, 9), (2, 8), (3, 7)]
    assert progress.curves(run)["loss"].epoch[-1] == 0


def test_a_number_that_is_none_is_a_gap(run: Run) -> None:
    log(run, at(1, loss=9.0), at(2, loss=None), at(3, loss=float("nan")), at(4, loss=6.0))
    assert np.isnan(progress.curves(run)["loss"].value).tolist() == [False, True, True, False]


def test_what_a_resumed_run_logs_again_replaces_what_stood_there(run: Run) -> None:
    log(run, *(at(step, loss=float(step)) for step in range(1, 7)))
    assert len(points(run, "loss")) == 6
    log(run, at(4, loss=40.0), at(5, loss=50.0))
    assert points(run, "loss") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]


def test_a_long_file_is_gone_on_with_by_whoever_reads_it_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CACHE_AFTER_BYTES", 1000)
    log(run, *(at(step, loss=float(step)) for step in range(1, 20_001)))
    whole = points(run, "loss")
    assert runs.files(run) == [("metrics.jsonl", run.dir.metrics.stat().st_size)]

    def later(run: Run) -> list[tuple[float, float]]:
        progress._reader.cache_clear()
        return points(run, "loss")

    seen: list[bytes] = []
    with monkeypatch.context() as patch:
        read = progress._points
        patch.setattr(progress, "_points", lambda text: (seen.append(text), read(text))[1])
        assert later(run) == whole
        assert seen == []
        log(run, at(20_001, loss=0.0))
        assert later(run)[-1] == (20_001, 0)
        assert len(seen) == 1
    # Another file in its place, and a kept one that is spoiled, are read from the beginning.
    (run.path / progress.CACHE_FILE).write_bytes(b"spoiled")
    assert len(later(run)) == len(whole) + 1
    run.dir.metrics.write_text(run.dir.metrics.read_text().replace(', "loss": 20000.0', ', "loss": 7.0'))
    assert later(run)[-2] == (20_000, (sum(range(19_993, 20_000)) + 7) / 8)


@pytest.mark.parametrize("lines", [60, 3 * progress.MIN_ROWS_FOR_PYARROW])
@pytest.mark.parametrize(
    "names", [("rewards/0", "rewards/1", "rewards/2"), ("los", "lose", "lo.s"), ("a b", "ab", "a-b")]
)
def test_names_that_differ_in_what_numbers_are_written_with_are_different_curves(
    run: Run, names: tuple[str, ...], lines: int
) -> None:
    log(run, *(at(step, **{names[step % 3]: float(step)}) for step in range(1, lines + 1)))
    for number, name in enumerate(names):
        assert points(run, name) == [(step, step) for step in range(1, lines + 1) if step % 3 == number]


@pytest.mark.parametrize(("stage", "curve"), [("sft", "loss"), ("rm", "accuracy"), ("grpo", "reward")])
def test_the_newest_value_is_of_the_curve_that_tells_how_the_stage_goes(stage: str, curve: str, tmp_path: Path) -> None:
    spec = RunSpec.read({"name": stage, "model": {"model_name_or_path": "tiny"}, "stage": {"kind": stage}})
    lines = falling(40, reward=lambda step: step / 10, accuracy=lambda step: step / 80)
    run = past_run(tmp_path, spec, lines)
    assert progress.headline_curve(run) == curve
    assert run.facts.headline == pytest.approx(lines[-2][curve])  # the last line is of a validation
    assert progress.sparkline(run)[-1] == pytest.approx(lines[-2][curve], rel=0.1)


def test_of_a_run_that_goes_on_no_state_is_remembered(run: Run) -> None:
    remembered = progress._sparkline_while_unchanged.cache_info
    before = remembered().currsize
    for step in range(1, 6):
        log(run, at(step, loss=float(step)))
        assert progress.sparkline(run)[-1] == step
    assert remembered().currsize == before
    ended = dataclasses.replace(run, state="finished")
    assert (progress.sparkline(ended), remembered().currsize) == ([1, 2, 3, 4, 5], before + 1)
