"""A schedule that cannot be is told before the start, not by the first step of a training."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.schedules import schedule_arguments, warmup_problems
from tests.preloaded import run_python

RATE = 1e-3
# (schedule, its keywords): what transformers itself makes of each is the oracle.
GOOD = [
    ("cosine", {}),
    ("cosine", {"num_cycles": 1}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("linear", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("inverse_sqrt", {"timescale": 100}),
    ("inverse_sqrt", {"timescale": None}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1}),
    ("constant_with_warmup", {}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("reduce_lr_on_plateau", {"factor": 0.5, "patience": 2, "mode": "min"}),
    ("greedy", {"factor": 0.9, "min_lr": 1e-6}),
]
BAD = [
    ("polynomial", {"lr_end": 1e-2}),
    ("polynomial", {"lr_end": RATE}),
    ("cosine_with_min_lr", {}),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": None}),
    ("cosine_warmup_with_min_lr", {}),
    ("warmup_stable_decay", {}),
    ("linear", {"num_cycles": 1}),
    ("linear", {"lr_end": 0}),
    ("cosine", {"nu_cycles": 1}),
    ("cosine", {"num_training_steps": 5}),
    ("cosine", {"num_cycles": "two"}),
    ("inverse_sqrt", {"timescale": 0}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "steep"}),
    ("reduce_lr_on_plateau", {"factor": 1.5}),
    ("reduce_lr_on_plateau", {"mode": "best"}),
    ("reduce_lr_on_plateau", {"threshold_mode": "x"}),
    ("greedy", {"mode": "up"}),
    ("polynomial", {"power": [1]}),
    ("cosine_with_min_lr", {"min_lr": "small"}),
]
# transformers goes on with these, and trains otherwise than anybody can mean.
SENSELESS = [
    ("cosine_with_min_lr", {"min_lr": 1.0}),
    ("cosine_with_min_lr", {"min_lr_rate": -1}),
    ("constant", {"min_lr": 1e-5}),
    ("constant_with_warmup", {"num_cycles": 1}),
    ("polynomial", {"power": -1}),
    ("polynomial", {"lr_end": -1e-3}),
    ("warmup_stable_decay", {"num_decay_steps": -1}),
    ("cosine_with_restarts", {"num_cycles": -2}),
]


def told(schedule: str, keywords: dict[str, Any], **training: Any) -> list[str]:
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"datasets": ["a"], "validation_share": 0.1},
            "training": {"lr_scheduler_type": schedule, "learning_rate": RATE, **training},
            "extra": {"lr_scheduler_kwargs": keywords} if keywords else {},
        }
    )
    found = spec_problems(spec)
    assert all(one.text("en") != one.text("zh") for one in found)
    return [one.code for one in found]


def test_what_transformers_refuses_is_refused_and_what_it_takes_is_taken() -> None:
    ask = (
        "import json, sys, torch; from transformers import get_scheduler\n"
        "def fails(schedule, keywords):\n"
        "    try:\n"
        f"        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr={RATE})\n"
        "        made = get_scheduler(schedule, optimizer, 2, 100, keywords)\n"
        "        for _ in range(5):\n"
        "            optimizer.step(); made.step(*[1.0] * (schedule in ('reduce_lr_on_plateau', 'greedy')))\n"
        "    except Exception: return True\n"
        "    return False\n"
        "print(json.dumps([fails(*one) for one in json.load(sys.stdin)]))"
    )
    assert json.loads(run_python("-c", ask, input=json.dumps(GOOD + BAD))) == [False] * len(GOOD) + [True] * len(BAD)
    assert {str(one): told(*one) for one in GOOD} == {str(one): [] for one in GOOD}
    assert [one for one in BAD if not told(*one)] == []


@pytest.mark.parametrize(("schedule", "keywords"), SENSELESS)
def test_what_would_be_trained_otherwise_than_it_is_meant_is_refused_too(
    schedule: str, keywords: dict[str, Any]
) -> None:
    assert told(schedule, keywords)


@pytest.mark.parametrize("keywords", [{"min_lr": float("inf")}, {"min_lr": True}, {"min_lr": {}}, {1: 2}, {"": None}])
def test_hostile_keywords_are_problems_and_never_errors(keywords: dict[Any, Any]) -> None:
    assert told("cosine_with_min_lr", keywords)


def test_a_warm_up_as_long_as_the_run_is_told_with_the_number_of_steps() -> None:
    assert told("cosine", {}, warmup_steps=100, max_steps=100) == ["warmup-too-long"]
    assert told("cosine", {}, warmup_steps=99, max_steps=100) == []
    assert told("cosine", {}, warmup_steps=0.5, max_steps=100) == []
    decay = {"num_decay_steps": 60}
    assert told("warmup_stable_decay", decay, warmup_steps=40, max_steps=100) == []
    spec = RunSpec.read(
        {
            "training": {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.5},
            "extra": {"lr_scheduler_kwargs": decay},
        }
    )
    (found,) = warmup_problems(spec, 100)
    assert (found.code, found.values["largest"]) == ("decay-too-long", 50)


def test_every_schedule_of_the_spec_has_its_keywords_written_down() -> None:
    from engine.spec.run_spec import Scheduler

    assert set(schedule_arguments()) == set(Scheduler.__args__)
