"""How many rows of each data set are held out for validation, and how often each of the others is used. Pure
arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from engine.spec.run_spec import Data


def held_out(data: Data, rows: Mapping[str, int]) -> dict[str, int]:
    """How many rows of each training set are held out for validation, given the number of rows of each.

    A share is taken from each set, but at least one row. A number of rows is divided among the sets by their sizes, the
    largest remainders first (Hamilton's method).
    """
    if not data.validation_rows:
        share = data.validation_share
        return {name: max(round(count * share), 1) if share else 0 for name, count in rows.items()}
    total = sum(rows.values())
    held_out_rows = min(data.validation_rows, total)
    exact = {name: held_out_rows * count / max(total, 1) for name, count in rows.items()}
    counts = {name: int(part) for name, part in exact.items()}
    by_remainder = sorted(rows, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: held_out_rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def repeats(data: Data, rows: Mapping[str, int]) -> dict[str, float]:
    """How often each row of each set is used in an epoch, given the numbers of rows that are trained on.

    concat: according to the weights. interleave_under and interleave_over: the weights are the probabilities with which
    the next row is taken from each set, until the first of them is used up, or all are
    (`datasets.interleave_datasets`).
    """
    weights = {name: data.datasets[name] for name in rows}
    if data.mix_strategy == "concat":
        return weights
    total = sum(weights.values())
    chance = {name: weight / total for name, weight in weights.items()}
    lengths = [count / chance[name] for name, count in rows.items() if count]
    length = (min if data.mix_strategy == "interleave_under" else max)(lengths, default=0)
    return {name: chance[name] * length / count if count else 0.0 for name, count in rows.items()}
