"""Significance by bootstrap: intervals and paired differences of any metric, by resampling rows.

Rows are resampled with replacement, as many as there are, two thousand times (Efron 1979; for comparing two systems on
one test set Koehn 2004, "Statistical significance tests for machine translation evaluation"). Both models are evaluated
on the same samples, since what is hard for one is mostly hard for the other. Any metric can be used, see
`engine.worker.evaluation.metrics`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from engine.worker.evaluation.metrics import Metric

RESAMPLES, SEED = 2000, 20040725
CONFIDENCE_LEVEL = 0.95
MIN_ROWS = 10  # with fewer, a resample is too often the same rows again, and intervals are too narrow
MAX_NUMBERS_IN_MEMORY = 1 << 24

Verdict = Literal["better", "worse", "same", "more", "less"]


class Interval(NamedTuple):
    """A value over all rows, and the interval of 95 % of its resamples; no interval for few rows."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A model's value minus the base's. `verdict` "same": the difference may be chance. For a metric that is neither
    better high nor low, it is "more" or "less"."""

    value: float
    low: float | None
    high: float | None
    verdict: Verdict


def resampled(measure: Metric, seed: int = SEED) -> np.ndarray:
    """The metric of each resample (2,000,). The same samples for every metric over as many rows."""
    rows, width = measure.sums.shape
    rng = np.random.default_rng(seed)
    scores = []
    step = max(MAX_NUMBERS_IN_MEMORY // max(rows, 1), 1)
    for start in range(0, RESAMPLES, step):
        batch = min(step, RESAMPLES - start)
        drawn = rng.integers(rows, size=(batch, rows))
        counts = np.zeros((batch, rows))
        for number, draw in enumerate(drawn):
            counts[number] = np.bincount(draw, minlength=rows)
        scores.append(measure.score(counts @ measure.sums.reshape(rows, width)))
    return np.concatenate(scores)


def interval(measure: Metric, draws: np.ndarray | None = None) -> Interval:
    """The value and its interval. `draws`: those of `resampled`, if they are already known."""
    if row_count(measure) < MIN_ROWS:
        return Interval(measure.value, None, None)
    return Interval(measure.value, *_percentile_interval(resampled(measure) if draws is None else draws))


def difference(
    ours: Metric, base: Metric, draws: np.ndarray | None = None, base_draws: np.ndarray | None = None
) -> Difference:
    """How far `ours` is from `base` on the same rows, and whether that may be chance."""
    delta = ours.value - base.value
    if min(row_count(ours), row_count(base)) < MIN_ROWS:
        return Difference(delta, None, None, "same")
    draws = resampled(ours) if draws is None else draws
    base_draws = resampled(base) if base_draws is None else base_draws
    low, high = _percentile_interval(draws - base_draws)
    return Difference(delta, low, high, _verdict(low, high, ours.better))


def row_count(measure: Metric) -> int:
    """The number of rows that the metric covers."""
    return int((measure.sums != 0).any(1).sum())


def _percentile_interval(draws: np.ndarray) -> tuple[float | None, float | None]:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


def _verdict(low: float | None, high: float | None, better: str) -> Verdict:
    if low is None or high is None or low <= 0 <= high:
        return "same"
    up = low > 0
    if better == "neither":
        return "more" if up else "less"
    return "better" if up == (better == "higher") else "worse"
