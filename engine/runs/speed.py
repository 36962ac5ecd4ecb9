"""How long a training will take: as fast as the last run of the same model was, else a rough guess from the arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

from engine.core import hardware
from engine.core.problems import Refusal
from engine.launch.command import on_cpu
from engine.launch.workspace import Workplace
from engine.runs import progress, runs
from engine.spec.run_spec import RunSpec

LOOKED_AT = 30  # newest runs
# Share of the speed of plain matrix products that a training reaches, and what a card of a generation does in them.
REACHED = 0.35
CARDS = {
    12.0: 400e12,
    9.0: 600e12,
    8.0: 200e12,
    7.0: 60e12,
    0.0: 10e12,
}  # compute capability → bf16 or fp16 per second


@dataclass(frozen=True)
class Guess:
    """Seconds of the training proper, and the run whose speed was taken; "" for a rough guess."""

    seconds: float
    like: str


def training_time(spec: RunSpec, tokens: float, parameters: int | None, workplace: Workplace) -> Guess | None:
    """For so many tokens, all epochs together; None if nothing is known to go by."""
    for run in runs.find(workplace.saves, "training")[:LOOKED_AT]:
        try:
            alike = (run.spec.model, run.spec.method, run.spec.stage.kind, run.spec.hardware) == (
                spec.model, spec.method, spec.stage.kind, spec.hardware,
            )  # fmt: skip
            rate = progress.progress(run).tokens_per_s if alike else None
        except (Refusal, OSError):
            continue
        if rate:
            return Guess(tokens / rate, run.title)
    if not parameters:
        return None
    # Forward 2 operations for each weight and token, backward to the activations 2, and 2 for trained weights.
    passes = {"full": 6}.get(spec.method.kind, 4) + 2 * spec.training.gradient_checkpointing
    return Guess(tokens * parameters * passes / (_speed(spec) * REACHED), "")


def _speed(spec: RunSpec) -> float:
    """Operations per second of all devices of the run."""
    cards = hardware.gpus()
    if on_cpu(spec, len(cards)):
        return _cpu_speed()
    best = next(speed for capability, speed in CARDS.items() if cards[0].capability >= capability)
    return best * spec.hardware.num_processes


@cache
def _cpu_speed() -> float:
    """Measured once, in a few hundredths of a second."""
    import numpy as np

    size = 512
    one = np.ones((size, size), np.float32)
    one @ one
    began = time.perf_counter()
    for _ in range(4):
        one @ one
    return 4 * 2 * size**3 / (time.perf_counter() - began)
