"""The newest sample answers of a run, from its samples.jsonl. Only the end of the file is read."""

from __future__ import annotations

import json
from typing import Any

from engine.core.rundir import RunDir, end_of

TAIL_BYTES = 512 * 1024  # bytes


def latest(run: RunDir, count: int = 20) -> list[dict[str, Any]]:
    """The newest `count` samples, newest first, as written by engine.worker.training.samples; damaged lines are left
    out.

    A resumed run goes back to its checkpoint: what it writes from there replaces the old samples.
    """
    samples: list[dict[str, Any]] = []
    after = False  # whether this sample was written before a resume and comes after it by its step
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
    """A complete line as a sample, otherwise None: the first line is incomplete if the file is longer than what is
    read."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(value, dict) and {"step", "prompt", "completion", "reward", "rewards"} <= set(value)
    return value if whole and isinstance(value["step"], int) else None
