"""Answers that a model wrote while it trained, as the page shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import RunDir
from engine.runs import samples
from engine.worker.training.samples import Sample, samples_are_due, write_samples
from webui.runs_tab import samples_html
from webui.words import Words


def write(run: RunDir, *steps: int, text: str = "four") -> None:
    for step in steps:
        prompt = [{"role": "user", "content": "Two and two?"}]
        write_samples(run, step, [Sample(prompt, f"{text} {one}", 1.5, {"exact": 1.0, "length": None}) for one in "ab"])


def seen(run: RunDir, count: int = 20) -> list[tuple[int, str]]:
    return [(one["step"], one["completion"]) for one in samples.latest(run, count)]


def test_the_newest_come_first_and_only_so_many(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert seen(run) == []
    write(run, *range(1, 40))
    assert seen(run, 3) == [(39, "four b"), (39, "four a"), (38, "four b")]
    assert len(seen(run)) == 20


def test_a_resumed_run_replaces_what_it_had_written_after_its_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write(run, 1, 2, 3, 4, text="old")
    write(run, 3, 4, text="new")
    write(run, 4, text="new")  # killed at once, and resumed again
    steps = [f"{step} {text}" for step, text in seen(run)]
    assert steps == [
        "4 new b",
        "4 new a",
        "3 new b",
        "3 new a",
        "2 old b",
        "2 old a",
        "1 old b",
        "1 old a",
    ]


def test_spoiled_lines_are_left_out_and_half_a_line_harms_no_other(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write(run, 1)
    with run.samples.open("a") as file:
        file.write('[]\n{"step": "x"}\n\xff\n{"step": 2, "prom')
    write(run, 3)
    assert [step for step, _ in seen(run)] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("every", "stride", "steps"),
    [(1, 1, [1, 2, 3, 4, 5, 6]), (3, 1, [3, 6]), (4, 2, [3]), (2, 3, [1, 4]), (10, 1, [])],
)
def test_answers_are_shown_every_so_many_steps(every: int, stride: int, steps: list[int]) -> None:
    assert [step for step in range(1, 7, stride) if samples_are_due(step, every, stride)] == steps


@pytest.mark.parametrize(
    ("completion", "opened"),
    [
        ("<|channel|>analysis<|message|>well<|end|><|start|>assistant<|channel|>final<|message|>yes", False),
        ("<think>well</think>\n\nyes", False),
        ("well</think>yes", True),
    ],
)
def test_reasoning_is_folded_beside_the_answer(completion: str, opened: bool) -> None:
    sample = {"step": 1, "prompt": "sure?", "completion": completion, "reward": 1.0, "rewards": {}, "opened": opened}
    html = samples_html.samples([sample], Words("en"))
    assert "<div>well</div></details>yes</td>" in html
    unfinished = samples_html.samples([sample | {"completion": "well", "opened": True}], Words("en"))
    assert "<div>well</div></details></td>" in unfinished


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_a_model_writes_cannot_be_markup(language: str) -> None:
    hostile: dict[str, Any] = {
        "step": 7,
        "prompt": [{"role": "<i>", "content": "<script>1</script>"}, {"role": "user", "content": None}],
        "completion": "<img src=x onerror=alert(1)>\nnext",
        "reward": -0.25,
        "rewards": {"<b>": 1},
    }
    html = samples_html.samples(
        [hostile, hostile | {"completion": "", "prompt": "<u>", "reward": None}], Words(language)
    )
    assert not [tag for tag in ("<script", "<img", "<b>", "<u>", "<i>:") if tag in html]
    assert "&lt;script&gt;" in html
    assert "next" in html
    assert Words(language)("samples-empty") in html
