"""A few of the answers that the model writes while it trains, one line each in the run's samples.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.rundir import RunDir, append_lines

KEPT = 4  # answers of a step


@dataclass(frozen=True)
class Sample:
    """An answer as it was scored. `prompt` is the list of messages; `rewards` are without their weights."""

    prompt: list[dict[str, Any]]
    completion: str
    reward: float | None
    rewards: dict[str, float | None]


def due(step: int, every: int, stride: int = 1) -> bool:
    """Whether answers of this step are to be shown, if `step` is counted from 0 and new ones come each `stride` steps."""
    return step % every < stride


def write_samples(run: RunDir, step: int, samples: Iterable[Sample]) -> None:
    """Add the answers of a step, of which there had better be no more than `KEPT`. A full disk loses them and no more."""
    with contextlib.suppress(OSError):
        append_lines(run.samples, ({"step": step, **asdict(sample)} for sample in samples))
