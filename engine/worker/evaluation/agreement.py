"""How far a judge agrees with a person: measures of its scores against thumbs, of its choices against preferences.

The area under the ROC curve is the chance that a liked answer has a higher score than a disliked one, ties counting
half (Mann & Whitney 1947; Hanley & McNeil 1982). Kappa is agreement beyond chance (Cohen 1960). All are functions of
sums over rows, so that `engine.worker.evaluation.bootstrap` can resample the ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.worker.evaluation.bootstrap import interval
from engine.worker.evaluation.metrics import Metric, mean


class Agreement(NamedTuple):
    """Agreement of the statement "a score of at least this is a thumb up" with the thumbs, each (…, thresholds).
    `share` is in percent."""

    share: np.ndarray
    kappa: np.ndarray


def thumb_agreement(scores: Sequence[float], ups: Sequence[bool]) -> dict[str, Any]:
    """Scores against thumbs: {"auc", "best", "median"}, where the latter two have a threshold, the share of the same
    verdicts and kappa, at the threshold with the highest kappa, and at the median of the scores. Each value has its
    interval. Only the counts if all thumbs are the same."""
    counts = {"ratings": len(scores), "up": int(sum(ups)), "down": int(len(ups) - sum(ups))}
    if not (counts["up"] and counts["down"]):
        return counts
    values, place = np.unique(np.asarray(scores, float), return_inverse=True)
    sums = np.zeros((len(scores), 2, len(values)))  # each row is an up or a down at one score
    sums[np.arange(len(scores)), np.where(ups, 0, 1), place] = 1
    flat = sums.reshape(len(scores), -1)
    median = int(np.searchsorted(values, np.median(scores)))

    def measured(score: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        return interval(Metric(flat, score))._asdict()

    whole = agreement_by_threshold(flat.sum(0))
    best = int(np.nanargmax(whole.kappa))
    return counts | {
        "auc": measured(auc),
        "best": {
            "threshold": float(values[best]),
            "agreement": measured(lambda totals: _at_best(totals)[0]),
            "kappa": measured(lambda totals: _at_best(totals)[1]),
        },
        "median": {
            "threshold": float(values[median]),
            "agreement": measured(lambda totals: agreement_by_threshold(totals).share[..., median]),
            "kappa": measured(lambda totals: agreement_by_threshold(totals).kappa[..., median]),
        },
    }


def auc(totals: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of summed counts (…, 2 × values): ups and downs at each score, in ascending order.
    NaN without an up or a down."""
    ups, downs = np.split(totals, 2, axis=-1)
    below = downs.cumsum(-1) - downs / 2
    pairs = ups.sum(-1) * downs.sum(-1)
    return np.divide((ups * below).sum(-1), pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def agreement_by_threshold(totals: np.ndarray) -> Agreement:
    """For each score as the threshold, the share of thumbs that agree with it, and Cohen's kappa; NaN where chance
    alone would give all of them."""
    ups, downs = np.split(totals, 2, axis=-1)
    rows = totals.sum(-1, keepdims=True)
    hits, alarms = (_from_each(counts) for counts in (ups, downs))
    up = ups.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        same = (hits + (rows - up) - alarms) / rows
        called_up, is_up = (hits + alarms) / rows, up / rows
        chance = called_up * is_up + (1 - called_up) * (1 - is_up)
        kappa = np.where(chance < 1, (same - chance) / (1 - chance), np.nan)
    return Agreement(100 * same, kappa)


def _from_each(counts: np.ndarray) -> np.ndarray:
    """The sum of the counts at each score and all above it."""
    return counts[..., ::-1].cumsum(-1)[..., ::-1]


def _at_best(totals: np.ndarray) -> Agreement:
    """Share and kappa at the threshold with the highest kappa, chosen anew for each resample."""
    every = agreement_by_threshold(totals)
    best = np.nan_to_num(every.kappa, nan=-np.inf).argmax(-1)[..., None]
    return Agreement(*(np.take_along_axis(values, best, -1)[..., 0] for values in every))


def preference_agreement(points: Sequence[float]) -> dict[str, Any]:
    """Choices against preferences: 1 for the same choice, 0 for the other, 0.5 for one that depends on the order."""
    share = {"agreement": interval(mean(points, scale=100))._asdict()} if len(points) else {}
    return {"ratings": len(points)} | share
