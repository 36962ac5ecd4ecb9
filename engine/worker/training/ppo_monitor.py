"""Sees when reinforcement learning has gone wrong for good, and says why. Pure: it is told figures and stops nothing."""

from __future__ import annotations

import math
from collections import deque

from engine.core.problems import Problem, problem

WATCHED = 5  # batches in a row that have to look bad
LOWEST_KL = (
    -1.0
)  # nats an answer. A KL is never negative; a mean of samples this far below zero is no accident
HIGHEST_KL = 5.0  # nats a token: what the model writes, the reference would write one time in 150 a token
SHORTEST = 1.1  # tokens an answer, the end among them


class Watch:
    """Looks at each batch, and says after a few bad ones in a row why it makes no sense to go on."""

    def __init__(self) -> None:
        self.kl: deque[float] = deque(maxlen=WATCHED)
        self.kl_of_token: deque[float] = deque(maxlen=WATCHED)
        self.length: deque[float] = deque(maxlen=WATCHED)

    def __call__(self, metrics: dict[str, float], step: int) -> Problem | None:
        """`told`: the figures of a batch by their names. None: it may go on."""
        spoiled = [name for name, value in metrics.items() if not math.isfinite(value)]
        if spoiled:
            return problem("ppo-not-finite", "training.learning_rate", step=step, names=", ".join(spoiled))
        self.kl.append(metrics["kl"])
        self.kl_of_token.append(metrics["kl"] / metrics["answer_length"])
        self.length.append(metrics["answer_length"])
        if len(self.kl) < WATCHED:
            return None
        kl, kl_of_token = sum(self.kl) / WATCHED, sum(self.kl_of_token) / WATCHED
        if kl < LOWEST_KL:
            return problem("ppo-negative-kl", "stage.temperature", step=step, kl=f"{kl:.2f}", batches=WATCHED)
        if kl_of_token > HIGHEST_KL:
            return problem(
                "ppo-runaway-kl", "stage.init_kl_coef", step=step, kl=f"{kl_of_token:.1f}", batches=WATCHED
            )
        if max(self.length) <= SHORTEST and metrics["ended"] > 0.5:
            return problem("ppo-empty-answers", "stage.reward_model", step=step, batches=WATCHED)
        return None
