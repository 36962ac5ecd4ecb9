"""Detect when reinforcement learning has irrecoverably failed, and why. Pure: it reads metrics and stops nothing."""

from __future__ import annotations

import math
from collections import deque

from engine.core.problems import Problem, problem

BATCHES_MONITORED = 5  # batches in a row that have to look bad
MIN_KL = -1.0  # nats per answer. A KL is never negative; a mean of samples this far below zero is no accident
MAX_KL_PER_TOKEN = 5.0  # nats per token: the reference gives the model's tokens 1/150 of their probability
MIN_ANSWER_TOKENS = 1.1  # tokens per answer, including the end token


class PpoMonitor:
    """Checks each batch, and says after a few bad ones in a row why it makes no sense to continue."""

    def __init__(self) -> None:
        self.kl: deque[float] = deque(maxlen=BATCHES_MONITORED)
        self.kl_of_token: deque[float] = deque(maxlen=BATCHES_MONITORED)
        self.length: deque[float] = deque(maxlen=BATCHES_MONITORED)

    def __call__(self, metrics: dict[str, float], step: int) -> Problem | None:
        """`metrics`: those of a batch by their names. None: it may continue."""
        spoiled = [name for name, value in metrics.items() if not math.isfinite(value)]
        if spoiled:
            return problem("ppo-not-finite", "training.learning_rate", step=step, names=", ".join(spoiled))
        self.kl.append(metrics["kl"])
        self.kl_of_token.append(metrics["kl"] / metrics["answer_length"])
        self.length.append(metrics["answer_length"])
        if len(self.kl) < BATCHES_MONITORED:
            return None
        kl, kl_of_token = sum(self.kl) / BATCHES_MONITORED, sum(self.kl_of_token) / BATCHES_MONITORED
        if kl < MIN_KL:
            return problem("ppo-negative-kl", "stage.temperature", step=step, kl=f"{kl:.2f}", batches=BATCHES_MONITORED)
        if kl_of_token > MAX_KL_PER_TOKEN:
            return problem(
                "ppo-runaway-kl",
                "stage.init_kl_coef",
                step=step,
                kl=f"{kl_of_token:.1f}",
                batches=BATCHES_MONITORED,
            )
        if max(self.length) <= MIN_ANSWER_TOKENS and metrics["ended"] > 0.5:
            return problem("ppo-empty-answers", "stage.reward_model", step=step, batches=BATCHES_MONITORED)
        return None
