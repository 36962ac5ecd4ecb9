"""Several runs beside each other: what differs, which is best, what belongs together, and what a spreadsheet gets."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import write_text
from engine.runs import compare
from engine.runs.compare import ABSENT
from engine.runs.progress import curves
from engine.runs.runs import Run
from tests.past_runs import falling, run_maker
from webui.words import Words

EN = Words("en")
Make = Callable[..., Run]


@pytest.fixture
def past(tmp_path: Path) -> Make:
    return run_maker(tmp_path)


def differing(*runs: Run) -> dict[str, tuple[Any, ...]]:
    return {one.path: one.values for one in compare.differences([compare.spec_of(run) for run in runs])}


def figure(runs: list[Run], name: str, of: str = "last") -> compare.Figure:
    found = compare.figures(runs, compare.curves(runs))
    return next(one for one in found if (one.name, one.of) == (name, of))


# ------------------------------------------------------------------------------------------ what differs


def test_only_what_differs_is_told_and_a_name_is_no_setting(past: Make) -> None:
    runs = past("a"), past("b", training__learning_rate=2e-3, data__datasets={"names": 2, "chats": 1})
    assert differing(*runs) == {
        "data.datasets": ({"names": 1.0}, {"names": 2.0, "chats": 1.0}),
        "training.learning_rate": (runs[0].spec.training.learning_rate, 2e-3),
    }
    assert differing(past("c"), past("d")) == {}


def test_a_setting_that_a_stage_does_not_have_is_absent_there_and_not_none(past: Make) -> None:
    told = differing(past("a"), past("b", stage="dpo"), past("c", method="full"))
    assert told["stage"] == ("sft", "dpo", "sft")
    assert told["stage.beta"] == (ABSENT, 0.1, ABSENT)
    assert told["method.r"] == (16, 16, ABSENT)


def test_two_ways_to_one_model_folder_are_no_difference(past: Make, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    ways = str(tmp_path / "base"), str(tmp_path / "link"), f"{tmp_path}/link/../base/"
    runs = [past(f"run-{number}", model__model_name_or_path=way) for number, way in enumerate(ways)]
    assert differing(*runs) == {}
    other = past("other", model__model_name_or_path=str(tmp_path / "elsewhere"))
    assert list(differing(*runs, other)) == ["model.model_name_or_path"]


def test_a_spec_that_cannot_be_read_makes_nothing_differ(past: Make) -> None:
    runs = past("a"), past("b", method__r=64), past("c")
    for text in ("{", "stage: never heard of it\n", ""):
        write_text(runs[2].dir.spec, text)
        broken = compare.runs.read(runs[2].path, runs[2].path.parents[2])
        assert differing(runs[0], broken) == {}
        assert differing(*runs[:2], broken) == {"method.r": (16, 64, ABSENT)}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"names": 2.0, "chats": 1.0}, "names × 2, chats"),
        ({"names": 0.5}, "names × 0.5"),
        ({"adam_beta2": 0.95, "fused": True}, "adam_beta2 × 0.95, fused: True"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        (2e-4, "0.0002"),
        (1 / 3, "0.3333333333333333"),
        (None, ""),
    ],
)
def test_a_value_fits_into_one_line(value: Any, text: str) -> None:
    assert compare.format_value(value) == text


# ------------------------------------------------------------------------------------------ which is best


def at(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "time": step * 2.0, **values}


def test_the_lowest_loss_and_the_highest_accuracy_are_best(past: Make) -> None:
    runs = [
        past(
            "a",
            [at(1, loss=3.0, accuracy=0.1), at(2, loss=1.0, accuracy=0.9), at(3, loss=2.0, accuracy=0.5)],
            stage="rm",
        ),
        past("b", [at(1, loss=3.0, accuracy=0.1), at(2, loss=1.5, accuracy=0.8)], stage="rm"),
    ]
    assert figure(runs, "loss").values == (2.0, 1.5)
    assert figure(runs, "loss").best == {1}
    assert figure(runs, "loss", "best").values == (1.0, 1.5)
    assert figure(runs, "loss", "best").best == {0}
    assert figure(runs, "accuracy", "best").best == {0}
    assert figure(runs, "steps", "").values == (3, 2)
    assert figure(runs, "duration", "").values == (6, 4)


def test_of_two_stages_no_loss_is_the_better_one(past: Make) -> None:
    runs = [past("a", falling(20)), past("b", falling(20, end=0.1), stage="dpo")]
    assert figure(runs, "loss").best == frozenset()
    assert figure([*runs[:1], past("c", falling(20, end=0.1))], "loss").best == {1}


def test_equal_figures_are_not_marked_and_gaps_are_passed_over(past: Make) -> None:
    gaps = [at(1, loss=2.0), at(2, loss=None), at(3, loss=math.nan), at(4, loss=math.inf)]
    runs = [past("a", gaps), past("b", [at(1, loss=2.0)]), past("c")]
    assert figure(runs, "loss").values[:2] == (2.0, 2.0)
    assert math.isnan(figure(runs, "loss").values[2])
    assert figure(runs, "loss").best == frozenset()


def test_tokens_are_counted_between_two_lines_that_tell_them(past: Make) -> None:
    run = past("a", [at(2, loss=3.0, num_tokens=200.0), at(3, eval_loss=2.0), at(4, loss=1.0, num_tokens=400.0)])
    assert curves(run)["eval_loss"].tokens.tolist() == [300]
    assert figure([run], "tokens", "").values == (400,)
    assert figure([run], "tokens_per_s", "").values == (50,)
    assert math.isnan(curves(past("b", [at(1, loss=3.0)]))["loss"].tokens[0])


# ------------------------------------------------------------------------------------------ what belongs together


def test_a_sweep_is_grouped_by_a_setting_or_by_the_beginning_of_the_names(past: Make) -> None:
    ends = {"low-1": 1.0, "low-2": 3.0, "high-1": 5.0}
    runs = [
        past(name, [at(1, loss=end)], training__learning_rate=1e-3 if name.startswith("high") else 1e-4)
        for name, end in ends.items()
    ]
    by_rate = compare.group_runs(runs[::-1], "training.learning_rate")
    assert [(one.value, one.places) for one in by_rate] == [(1e-4, (1, 2)), (1e-3, (0,))]
    by_name = compare.group_runs(runs, compare.BY_NAME)
    assert [(one.value, one.places) for one in by_name] == [("low", (0, 1)), ("high", (2,))]
    losses = figure(runs, "loss").values
    assert compare.mean_and_spread(losses, by_name[0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    mean, spread, count = compare.mean_and_spread(losses, by_name[1])
    assert (mean, count) == (5.0, 1)
    assert math.isnan(spread)


def test_runs_of_one_name_are_told_apart(past: Make) -> None:
    runs = past("same", method__r=4), past("same", method="full"), past("other")
    called = compare.display_names(runs)
    assert called[2] == "other"
    assert len(set(called)) == 3


def test_beside_a_run_stand_those_of_the_same_model_and_stage(past: Make, tmp_path: Path) -> None:
    run = past("a")
    past("of another stage", stage="dpo")
    past("of another model", model__model_name_or_path="org/other")
    other = past("b")
    assert [one.id for one in compare.siblings(run, compare.training_runs(tmp_path))] == [run.id, other.id]


# ------------------------------------------------------------------------------------------ CSV


def rows(text: str) -> list[list[str]]:
    assert text.startswith("\ufeff"), "a spreadsheet takes it for something else than UTF-8"
    return list(csv.reader(io.StringIO(text[1:])))


def test_a_spreadsheet_gets_numbers_as_they_are_and_no_formula_of_a_name(past: Make) -> None:
    runs = [past("=1+1", [at(1, loss=1 / 3), at(2, loss=None)])]
    told = rows(compare.curves_csv(runs, "loss"))
    assert told[0][:2] == ["run", "step"]
    assert told[1] == ["'=1+1", "1.0", "0.1", "2.0", "", repr(1 / 3), repr(1 / 3), repr(1 / 3)]
    assert told[2][5] == ""


def test_many_lines_are_read_as_few_are(past: Make) -> None:
    """Whatever way the lines take: numbers between commas, JSON at once, or JSON line by line."""
    many = falling(3000, grad_norm=lambda step: -1e-7 * step)
    many[1500]["loss"] = None
    spoiled = past("a", many)
    with spoiled.dir.metrics.open("a") as file:
        file.write(json.dumps(at(3999, loss=6.0)) + "\n")
        file.write('{"step": 3999, "epoch": 1.0, "time": , "loss": 1.0}\n' * 700)
        file.write(json.dumps(at(4000, loss=7.0)) + "\n")
    told = curves(spoiled)["loss"]
    expected = [line["loss"] for line in many if "loss" in line] + [6.0, 7.0]
    assert len(told.value) == 3002
    for value, wanted in zip(told.value.tolist(), expected, strict=True):
        assert value == wanted or (wanted is None and math.isnan(value))
    assert curves(spoiled)["grad_norm"].value[-1] == pytest.approx(-3e-4)
