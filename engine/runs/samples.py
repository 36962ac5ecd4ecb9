"""The newest of the answers that a run's model wrote while it trained, from its samples.jsonl. Reads the end only."""

from __future__ import annotations

import json
from typing import Any

from engine.core.rundir import RunDir, end_of

TAIL_BYTES = 512 * 1024  # bytes


def latest(run: RunDir, count: int = 20) -> list[dict[str, Any]]:
    """The newest `count` samples, newest first, as
    engine.worker.training.samples wrote them; spoiled lines are left out.

    A resumed run goes back to its checkpoint: what it writes from there replaces what stood there.
    """
    samples: list[dict[str, Any]] = []
    after = False  # whether what is looked at was written before a resume, and comes after it by its step
    for line in reversed(end_of(run.samples, TAIL_BYTES).splitlines()):
        sample = _sample(line)
        if sample is None:
            continue
        after = bool(samples) and (
            sample["step"] > samples[-1]["step"] or (after and sample["step"] == samples[-1]["step"])
        )
        if not after and sample not in samples:
            samples.append(sample)
        if len(samples) == count:
            break
    return samples


def _sample(line: bytes) -> dict[str, Any] | None:
    """A whole line as a sample, else None: the first one is half a line where the file is longer than what is read."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(value, dict) and {"step", "prompt", "completion", "reward", "rewards"} <= set(value)
    return value if whole and isinstance(value["step"], int) else None
