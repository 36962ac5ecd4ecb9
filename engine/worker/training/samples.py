"""A few of the answers that the model generates during training, one line each in the run's samples.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.core.rundir import RunDir, append_lines

SAMPLES_PER_STEP = 4  # answers of a step


@dataclass(frozen=True)
class Sample:
    """An answer as it was scored. `prompt`: messages, or text as it was read; `rewards` are without their weights."""

    prompt: list[dict[str, Any]] | str
    completion: str
    reward: float | None
    rewards: dict[str, float | None]


def samples_are_due(step: int, every: int, stride: int = 1) -> bool:
    """Whether answers that serve `stride` steps from this one on are to be shown, which are counted from 1."""
    return (step + stride - 1) // every > (step - 1) // every


def write_samples(run: RunDir, step: int, samples: Iterable[Sample]) -> None:
    """Add the answers of a step, of which there had better be no more than
    `SAMPLES_PER_STEP`. A full disk loses them and no more."""
    with contextlib.suppress(OSError):
        append_lines(run.samples, ({"step": step, **asdict(sample)} for sample in samples))
