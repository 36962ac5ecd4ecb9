"""Estimate how long a training takes: from the last run of the same model, otherwise roughly from arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

from engine.core import hardware
from engine.core.problems import Refusal
from engine.launch.command import on_cpu
from engine.launch.workspace import Workplace
from engine.preflight.suitable_gpus import likely_gpus
from engine.runs import progress, runs
from engine.spec.run_spec import RunSpec

MAX_RUNS_SEARCHED = 30  # newest runs
# Share of the matrix multiplication speed that a training reaches, and that speed for each GPU generation.
REACHED_SHARE = 0.35
GPU_OPERATIONS_PER_S = {
    12.0: 400e12,
    9.0: 600e12,
    8.0: 200e12,
    7.0: 60e12,
    0.0: 10e12,
}  # compute capability → operations per second in bf16 or fp16


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the training proper, and the run whose speed was used; "" for a rough guess."""

    seconds: float
    like: str


def training_time(spec: RunSpec, tokens: float, parameters: int | None, workplace: Workplace) -> TimeEstimate | None:
    """For this number of tokens, all epochs together; None if there is nothing to base it on."""
    for run in runs.find(workplace.saves, "training")[:MAX_RUNS_SEARCHED]:
        try:
            alike = (run.spec.model, run.spec.method, run.spec.stage.kind, run.spec.hardware) == (
                spec.model,
                spec.method,
                spec.stage.kind,
                spec.hardware,
            )
            rate = progress.progress(run).tokens_per_s if alike else None
        except (Refusal, OSError):
            continue
        if rate:
            return TimeEstimate(tokens / rate, run.title)
    if not parameters:
        return None
    # Forward: 2 operations per weight and token; backward: 2 for the activations, and 2 for trained weights.
    passes = {"full": 6}.get(spec.method.kind, 4) + 2 * spec.training.gradient_checkpointing
    return TimeEstimate(tokens * parameters * passes / (_speed(spec) * REACHED_SHARE), "")


def _speed(spec: RunSpec) -> float:
    """Operations per second of all devices of the run."""
    gpus = hardware.planned_gpus()
    if on_cpu(spec, len(gpus)) or not gpus:
        return _cpu_speed()
    slowest = min(gpu.capability for gpu in likely_gpus(spec) or gpus)
    best = next(speed for capability, speed in GPU_OPERATIONS_PER_S.items() if slowest >= capability)
    return best * spec.hardware.num_processes


@cache
def _cpu_speed() -> float:
    """Measured once, in a few hundredths of a second: the fastest of ten multiplications, since others may compute
    meanwhile. Their mean made days of half an hour on a busy machine."""
    import numpy as np

    size = 512
    matrix = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
