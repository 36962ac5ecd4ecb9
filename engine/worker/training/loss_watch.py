"""Whether the loss shows that something is learned: it is neither exactly 0 for long, nor far above its best value."""

from __future__ import annotations

from engine.core.problems import Problem, problem
from engine.core.smoothing import SMOOTHING

POINTS_IN_A_ROW = 5  # logged points that must agree before anything is reported
RISE_FACTOR, MIN_RISE = 3.0, 1.0  # a smoothed loss is far above its best if it exceeds it by both


class LossWatch:
    """Receives the logged losses one after another. A problem is reported once, and again only if it was absent
    meanwhile."""

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.total, self.mass = 0.0, 0.0  # of the exponential moving average, as in `engine.core.smoothing`
        self.best = float("inf")  # lowest smoothed loss
        self.zeros, self.risen = 0, 0  # points in a row

    def add(self, step: int, loss: float) -> Problem | None:
        """The problem since this point. `loss` is finite."""
        self.total = self.total * SMOOTHING + loss * (1 - SMOOTHING)
        self.mass = self.mass * SMOOTHING + 1 - SMOOTHING
        smoothed = self.total / self.mass
        self.best = min(self.best, smoothed)
        limit = self.best + max(MIN_RISE, (RISE_FACTOR - 1) * abs(self.best))
        self.zeros = self.zeros + 1 if loss == 0 else 0
        self.risen = self.risen + 1 if smoothed > limit and step > self.warmup_steps else 0
        if self.zeros == POINTS_IN_A_ROW:
            return problem("loss-zero", step=step, count=self.zeros)
        if self.risen == POINTS_IN_A_ROW:
            values = {"loss": f"{smoothed:.4g}", "best": f"{self.best:.4g}"}
            return problem("loss-diverged", "training.learning_rate", step=step, **values)
        return None
