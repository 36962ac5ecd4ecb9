"""A few of the answers that the model generates during training, one line each in the run's samples.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.core.rundir import RunDir, append_lines

SAMPLES_PER_STEP = 4  # answers per step


@dataclass(frozen=True)
class Sample:
    """A scored answer. `prompt`: messages, or text as it was read; `rewards` are without their weights; `opened`: the
    prompt ended with the mark that opens reasoning."""

    prompt: list[dict[str, Any]] | str
    completion: str
    reward: float | None
    rewards: dict[str, float | None]
    opened: bool = False


def samples_are_due(step: int, every: int, stride: int = 1) -> bool:
    """Whether the answers that serve `stride` steps, starting with this one, are to be shown; steps are counted from
    1."""
    return (step + stride - 1) // every > (step - 1) // every


def write_samples(run: RunDir, step: int, samples: Iterable[Sample]) -> None:
    """Append the answers of a step, preferably no more than `SAMPLES_PER_STEP`. If the disk is full, only these are
    lost."""
    with contextlib.suppress(OSError):
        append_lines(run.samples, ({"step": step, **asdict(sample)} for sample in samples))
