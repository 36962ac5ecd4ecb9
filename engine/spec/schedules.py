"""The arguments of learning-rate schedules and their limits, checked before the start, because otherwise the first step
fails.

Names, types and defaults are those of transformers' own functions, as recorded by
`python -m engine.worker.training.trainer_arguments`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.problems import Problem, problem

if TYPE_CHECKING:
    from engine.spec.run_spec import RunSpec

SCHEDULE_ARGUMENTS_FILE = Path(__file__).parent / "schedule_arguments.json"
SCHEDULE_FIELD, KEYWORDS_FIELD = "training.lr_scheduler_type", "extra.lr_scheduler_kwargs"
# What a schedule requires: exactly one of these.
REQUIRED_KEYWORDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
VALIDATION_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # depend on validation results
SCHEDULES_WITHOUT_WARMUP = ("constant", *VALIDATION_SCHEDULES)
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")
KEYWORD_CHOICES = {
    "warmup_type": DECAY_SHAPES,
    "decay_type": DECAY_SHAPES,
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
}
# Smallest and largest value of keywords with the same meaning in every schedule; (low, high, whether low itself is
# allowed). The highest learning rate is the spec's own.
KEYWORD_LIMITS = {
    "min_lr_rate": (0, 1, True),
    "min_lr_ratio": (0, 1, True),
    "warmup_lr_rate": (0, 1, True),
    "factor": (0, 1, False),
    "num_cycles": (0, 1e9, False),
    "power": (0, 1e3, False),
    "timescale": (0, 1e9, False),
    "num_decay_steps": (0, 1e9, True),
    "num_stable_steps": (0, 1e9, True),
    "patience": (0, 1e9, True),
    "cooldown": (0, 1e9, True),
    "eps": (0, 1, True),
    "threshold": (0, 1e9, True),
}
LEARNING_RATE_KEYWORDS = ("min_lr", "lr_end")  # learning rates at which a schedule ends


@cache
def schedule_arguments() -> Mapping[str, Mapping[str, str]]:
    """Schedule → name → types ("float|null") of its keywords."""
    return json.loads(SCHEDULE_ARGUMENTS_FILE.read_text(encoding="utf-8"))


def schedule_problems(spec: RunSpec) -> list[Problem]:
    """Contradictions of the schedule with its keywords and with the rest of the training."""
    schedule, training = spec.training.lr_scheduler_type, spec.training
    problems = []
    if training.max_steps and training.warmup_steps >= 1:
        problems += warmup_problems(spec, training.max_steps)
    keywords = spec.extra.get("lr_scheduler_kwargs")
    keywords = keywords if isinstance(keywords, dict) else {}
    needed = REQUIRED_KEYWORDS.get(schedule, ())
    if needed and sum(keywords.get(name) is not None for name in needed) != 1:
        problems.append(
            problem("schedule-needs", SCHEDULE_FIELD, schedule=schedule, name=needed[0], needed=" / ".join(needed))
        )
    known = schedule_arguments()[schedule]
    for name, value in keywords.items():
        if name not in known:
            values = {"schedule": schedule, "name": name, "known": ", ".join(known) or "—"}
            problems.append(problem("schedule-argument-unknown", KEYWORDS_FIELD, **values))
        elif wrong := _value_problem(str(name), value, known[name], training.learning_rate):
            problems.append(wrong)
    return problems


def _value_problem(name: str, value: Any, types: str, rate: float) -> Problem | None:
    kind = {"NoneType": "null"}.get(type(value).__name__, type(value).__name__)
    allowed = types.split("|")
    if "any" not in allowed and kind not in allowed and not (kind == "int" and "float" in allowed):
        return problem("extra-type", KEYWORDS_FIELD, name=name, types=types.replace("|", ", "), given=str(value)[:60])
    if name in KEYWORD_CHOICES and value not in KEYWORD_CHOICES[name]:
        return problem(
            "spec-choice", KEYWORDS_FIELD, given=f"{name}: {value}", choices=", ".join(KEYWORD_CHOICES[name])
        )
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    low, high, included = (
        (0, rate, True) if name in LEARNING_RATE_KEYWORDS else KEYWORD_LIMITS.get(name, (-1e9, 1e9, True))
    )
    # The final rate of a schedule is below its initial rate: polynomial rejects even an equal one.
    below = value < high if name in ("lr_end", "factor") else value <= high
    if (value >= low if included else value > low) and below:
        return None
    return problem("schedule-limit", KEYWORDS_FIELD, name=name, given=value, low=low, high=high)


def warmup_problems(spec: RunSpec, steps: int) -> list[Problem]:
    """Warm-up, and an explicit decay, that do not fit into the number of steps."""
    training, schedule = spec.training, spec.training.lr_scheduler_type
    warm = training.warmup_steps if training.warmup_steps >= 1 else training.warmup_steps * steps
    if schedule not in SCHEDULES_WITHOUT_WARMUP and training.warmup_steps >= 1 and warm >= steps:
        return [problem("warmup-too-long", "training.warmup_steps", given=int(warm), steps=steps)]
    keywords = spec.extra.get("lr_scheduler_kwargs")
    decay = keywords.get("num_decay_steps") if isinstance(keywords, dict) else None
    if schedule == "warmup_stable_decay" and isinstance(decay, int) and warm + decay > steps:
        largest = max(int(steps - warm), 0)
        return [problem("decay-too-long", KEYWORDS_FIELD, given=decay, warm=int(warm), steps=steps, largest=largest)]
    return []
