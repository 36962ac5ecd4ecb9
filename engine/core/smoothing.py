"""Smoothing of curves by an exponential moving average, the same for the page's charts and training_loss.png."""

from __future__ import annotations

from collections.abc import Sequence

SMOOTHING = 0.6  # default weight of the past in a smoothed curve
MAX_SMOOTHING = 0.999


def exponential_moving_average(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """The smoothed values, without the bias towards zero at the start (bias correction as in Adam: Kingma & Ba 2015,
    section 3). Weight 0 changes nothing."""
    weight = min(max(weight, 0.0), MAX_SMOOTHING)
    if weight == 0:
        return list(values)
    averages, total, mass = [], 0.0, 0.0
    for value in values:
        total = total * weight + value * (1 - weight)
        mass = mass * weight + (1 - weight)
        averages.append(total / mass)
    return averages
