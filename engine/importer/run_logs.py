"""What LLaMA-Factory has logged during a training, as lines of our metrics.jsonl.

trainer_state.json has every value that the trainer logged, but no times, and is complete only when the training has
ended. trainer_log.jsonl grows with the training and has the times, but few of the values. So the values are those of
the first file, then those of the second beyond its last step, and the times are always those of the second.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.runs.facts import AXES

LOG_FILE, STATE_FILE = "trainer_log.jsonl", "trainer_state.json"
MAX_LOG_BYTES = 64 << 20  # of each of the two; 100,000 logged steps take some 30 MB
MAX_CURVES = 100
# Their names → ours. Other names in trainer_log.jsonl are about the progress.
NAMES_IN_LOG = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "reward": "reward",
    "accuracy": "rewards/accuracies",
    "lr": "learning_rate",
    "total_tokens": "num_tokens",
}
NAMES_IN_STATE = {"num_input_tokens_seen": "num_tokens"}
# Of a whole training or validation, not of a step.
TOTALS = re.compile(r"total_flos|train_(loss|runtime)|(train|eval)_(runtime|\w+_per_second)|eval_model_\w+|predict_\w+")
CURVE_NAME = re.compile(r"[A-Za-z][\w/.@-]{0,63}")
ELAPSED = re.compile(r"(?:(\d{1,9}) days?, )?(\d{1,2}):(\d\d):(\d\d)")  # as Python writes a timedelta


@dataclass(frozen=True)
class Logged:
    """`lines` are those of a metrics.jsonl, in the order of training; `step` is the last step, `total` that at which
    the training was to end (None: unknown), `seconds` the time until the last step (NaN: unknown)."""

    lines: Sequence[Mapping[str, Any]]
    step: int
    total: int | None
    seconds: float

    @property
    def names(self) -> set[str]:
        """The names of the curves."""
        return {name for line in self.lines for name in line if name not in AXES}

    @property
    def complete(self) -> bool | None:
        """Whether the training has reached its end; None if nothing says where that is."""
        return self.step >= self.total if self.total else None


def read_logged(log: bytes, state: bytes) -> Logged:
    """Both files together; each may be empty, and lines that are not JSON objects are left out."""
    logged = [line for line in _objects(log) if _is_step(line.get("current_steps"))]
    plain = _object(state)
    history = plain.get("log_history")
    history = [line for line in history if isinstance(line, dict)] if isinstance(history, list) else []
    steps, seconds = _times(logged)
    lines = list(_lines(history, "step", NAMES_IN_STATE, None))
    last = max((line["step"] for line in lines), default=-1)
    lines += (line for line in _lines(logged, "current_steps", NAMES_IN_LOG, NAMES_IN_LOG) if line["step"] > last)
    for line in lines:
        line["time"] = float(np.interp(line["step"], steps, seconds)) if len(steps) else None
    totals = [plain.get("max_steps"), *(line.get("total_steps") for line in logged[-1:])]
    done = [plain.get("global_step"), *(line["current_steps"] for line in logged[-1:])]
    return Logged(
        lines,
        max(filter(_is_step, [*done, *(line["step"] for line in lines)]), default=0),
        next((total for total in totals if _is_step(total) and total), None),
        float(seconds[-1]) if len(seconds) else math.nan,
    )


def _lines(
    entries: Sequence[Mapping[str, Any]], axis: str, renamed: Mapping[str, str], kept: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    """The entries with their curves under our names; `axis` is their key for the step, `kept` the only keys that are
    curves (None: all)."""
    known: set[str] = set()
    for entry in entries:
        if not _is_step(entry.get(axis)):
            continue
        values = {
            renamed.get(name, name): value
            for name, value in entry.items()
            if (name in kept if kept is not None else name not in (*AXES, axis) and not TOTALS.fullmatch(name))
            if _is_number(value) and CURVE_NAME.fullmatch(name)
        }
        values = {name: value for name, value in values.items() if name in known or len(known) < MAX_CURVES}
        known |= set(values)
        if values:
            epoch = entry.get("epoch")
            yield {"step": entry[axis], "epoch": epoch if _is_number(epoch) else None, **values}


def _times(logged: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps in ascending order, and the seconds of training until each. A resumed training counts from 0 again."""
    seconds_at: dict[int, float] = {}
    before = latest = 0.0
    for line in logged:
        matched = ELAPSED.fullmatch(str(line.get("elapsed_time")))
        if not matched:
            continue
        days, hours, minutes, seconds = (int(part or 0) for part in matched.groups())
        elapsed = ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
        if before + elapsed < latest:
            before = latest
        latest = before + elapsed
        seconds_at[line["current_steps"]] = latest
    steps = sorted(seconds_at)
    return np.array(steps, float), np.array([seconds_at[step] for step in steps], float)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: Any) -> bool:
    """Whether it can be a value of a curve: JSON has integers that no float can hold."""
    return isinstance(value, float) or (type(value) is int and _is_step(abs(value)))


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # empty, or being written
        return {}
    return value if isinstance(value, dict) else {}


def _objects(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if value := _object(line):
            yield value
