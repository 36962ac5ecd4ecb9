"""What a finished reward model run recorded in its result folder, and whether it is good enough to learn from.

The run writes `evaluation.json` with its accuracy on held-out pairs, and `evaluation_pairs.jsonl` with some of these
pairs as token ids and their scores. Loading and testing the model is left to `engine.worker.training.reward_scorer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from engine.core.problems import Problem, problem
from engine.core.rundir import RESULT_FILE, read_lines, read_object

EVALUATION_FILE, PAIRS_FILE = "evaluation.json", "evaluation_pairs.jsonl"


@dataclass(frozen=True)
class ScoredPair:
    """One held-out pair with the scores that the run gave its answers."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_score: float
    rejected_score: float


def pairs_of(folder: Path) -> list[ScoredPair]:
    """The pairs in a result folder; invalid lines are left out."""
    names = [field.name for field in fields(ScoredPair)]
    lines = [line for line in read_lines(folder / PAIRS_FILE) if set(names) <= set(line)]
    return [ScoredPair(**{name: line[name] for name in names}) for line in lines]


def accuracy_of(folder: Path) -> tuple[float, int] | None:
    """The share of held-out pairs that the run ranked correctly, and their number; None if it is not recorded."""
    evaluation = read_object(folder / EVALUATION_FILE)
    return (evaluation["accuracy"], evaluation["pairs"]) if evaluation.get("pairs") else None


def reward_model_problems(folder: Path, field: str = "stage.reward_model") -> list[Problem]:
    """Why the result in `folder` cannot be used as a reward, as far as its files show. Empty: it can be loaded."""
    if not folder.is_dir():
        return [problem("reward-missing", field, given=folder)]
    stage = read_object(folder / RESULT_FILE).get("stage")
    if stage != "rm":
        return [problem("reward-is-none", field, given=folder, stage=stage or "—")]
    measurement = accuracy_of(folder)
    if not measurement or not pairs_of(folder):
        return [problem("reward-unmeasured", field, given=folder)]
    accuracy, pairs = measurement
    # Chance ranks half of the pairs correctly, plus or minus this.
    if accuracy <= 0.5 + 0.5 / math.sqrt(pairs):
        return [problem("reward-at-chance", field, accuracy=f"{accuracy:.0%}", pairs=pairs)]
    return []
