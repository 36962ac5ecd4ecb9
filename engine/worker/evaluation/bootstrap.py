"""Whether a difference is real: intervals and paired differences of any measure by resampling rows.

Rows are drawn again with replacement, as many as there are, two thousand times (Efron 1979; for comparing two systems on
one test set Koehn 2004, "Statistical significance tests for machine translation evaluation"). Both models are measured on
the same draws, since what is hard for one is mostly hard for the other. What the measure is does not matter, see
`engine.worker.evaluation.measures`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from engine.worker.evaluation.measures import Measure

RESAMPLES, SEED = 2000, 20040725
LEVEL = 0.95
FEWEST = 10  # rows: of fewer, a resample is too often the same rows again, and intervals come out too narrow
CHUNK = 1 << 24  # numbers in memory at a time

Verdict = Literal["better", "worse", "same", "more", "less"]


class Interval(NamedTuple):
    """A value of all rows, and where 95 % of the resampled ones lie; none of few rows."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A model's value minus the base's. `verdict` "same": no difference that could not be chance. Of a measure that is
    neither better high nor low it is "more" or "less"."""

    value: float
    low: float | None
    high: float | None
    verdict: Verdict


def resampled(measure: Measure, seed: int = SEED) -> np.ndarray:
    """The measure of each resample (2,000,). The same draws for every measure of as many rows."""
    rows, width = measure.sums.shape
    source = np.random.default_rng(seed)
    found = []
    step = max(CHUNK // max(rows, 1), 1)
    for start in range(0, RESAMPLES, step):
        some = min(step, RESAMPLES - start)
        drawn = source.integers(rows, size=(some, rows))
        counts = np.zeros((some, rows))
        for number, one in enumerate(drawn):
            counts[number] = np.bincount(one, minlength=rows)
        found.append(measure.score(counts @ measure.sums.reshape(rows, width)))
    return np.concatenate(found)


def interval(measure: Measure, draws: np.ndarray | None = None) -> Interval:
    """The value and its interval. `draws`: those of `resampled`, where they are known already."""
    if counted(measure) < FEWEST:
        return Interval(measure.value, None, None)
    return Interval(measure.value, *_middle(resampled(measure) if draws is None else draws))


def difference(
    ours: Measure, base: Measure, draws: np.ndarray | None = None, base_draws: np.ndarray | None = None
) -> Difference:
    """How far `ours` is from `base` on the same rows, and whether that could be chance."""
    apart = ours.value - base.value
    if min(counted(ours), counted(base)) < FEWEST:
        return Difference(apart, None, None, "same")
    draws = resampled(ours) if draws is None else draws
    base_draws = resampled(base) if base_draws is None else base_draws
    low, high = _middle(draws - base_draws)
    return Difference(apart, low, high, _verdict(low, high, ours.better))


def counted(measure: Measure) -> int:
    """How many rows the measure is about."""
    return int((measure.sums != 0).any(1).sum())


def _middle(draws: np.ndarray) -> tuple[float | None, float | None]:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _verdict(low: float | None, high: float | None, better: str) -> Verdict:
    if low is None or high is None or low <= 0 <= high:
        return "same"
    up = low > 0
    if better == "neither":
        return "more" if up else "less"
    return "better" if up == (better == "higher") else "worse"
