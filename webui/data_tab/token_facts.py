"""What a sample of a set's rows says about training on all of them: the number of tokens, steps and minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.data.mixing import held_out
from engine.launch.workspace import Workplace
from engine.models.facts import inspect_model
from engine.runs import speed
from engine.runs.speed import TimeEstimate
from engine.spec.run_spec import RunSpec
from engine.spec.steps import optimizer_steps
from webui.numbers import duration, human
from webui.words import Words


@dataclass(frozen=True)
class TrainingEstimate:
    steps: int  # of the optimizer
    time: TimeEstimate | None  # None: too little is known about the model


def training_estimate(statistics: Mapping[str, Any], spec: RunSpec, workplace: Workplace) -> TrainingEstimate:
    """Steps and time of the spec on the whole set, extrapolated from the sample's examples and tokens."""
    scale = rows_per_sampled(statistics)
    examples = round(statistics["examples"] * scale)
    trained_on = max(examples - sum(held_out(spec.data, {"": examples}).values()), 1)
    if spec.data.packing:
        trained_on = max(math.ceil(statistics["tokens"] * scale / spec.data.max_length), 1)
    steps = optimizer_steps(spec, trained_on)
    examples_per_step = (
        spec.training.per_device_train_batch_size
        * spec.training.gradient_accumulation_steps
        * spec.hardware.num_processes
    )
    epochs = min(steps * examples_per_step / trained_on, 1e6)
    tokens = statistics["tokens"] * scale * epochs
    parameters = inspect_model(spec.model.model_name_or_path).parameters
    return TrainingEstimate(steps, speed.training_time(spec, tokens, parameters, workplace))


def rows_per_sampled(statistics: Mapping[str, Any]) -> float:
    return statistics["total"] / max(statistics["seen"], 1)


def token_facts(
    statistics: Mapping[str, Any], spec: RunSpec, workplace: Workplace, words: Words
) -> list[tuple[str, str, str]]:
    """The figures above the rows: the code of a label, the value, and a note."""
    scale = rows_per_sampled(statistics)
    about = "{:,}" if scale == 1 else "≈ {:,}"
    statuses = statistics["fates"]
    left_out = sum(count for status, count in statuses.items() if status not in ("kept", "cut"))
    share = statistics["trained"] / max(statistics["tokens"], 1)
    median = words("stat-median", count=f"{statistics['median']:,.0f}")
    estimate = training_estimate(statistics, spec, workplace)
    return [
        ("stat-examples", about.format(round(statistics["examples"] * scale)), ""),
        ("stat-cut", about.format(round(statuses.get("cut", 0) * scale)), ""),
        ("stat-left-out", about.format(round(left_out * scale)), ""),
        ("stat-trained-share", f"{share:.0%}", ""),
        ("stat-tokens", human(statistics["tokens"] * scale), words("stat-per-epoch")),
        ("stat-longest", f"{statistics['longest']:,}", median),
        ("stat-steps", about.format(estimate.steps), ""),
        ("stat-time", *_time(estimate.time, words)),
    ]


def _time(time: TimeEstimate | None, words: Words) -> tuple[str, str]:
    """The training time, and what the estimate is based on."""
    if time is None:
        return "—", ""
    basis = words("time-like", run=time.like) if time.like else words("time-rough")
    return duration(time.seconds, words), basis
