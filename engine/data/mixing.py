"""How many rows of each data set are kept for measuring, and how often each of the others is shown. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from engine.spec.run_spec import Data


def held_out(data: Data, rows: Mapping[str, int]) -> dict[str, int]:
    """Of how many rows of each training set is measured, from the number of rows that each has.

    A share is taken of each set, but at least one row; a number of rows is divided among the sets by their sizes, the
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
    """How often each row of each set is shown in an epoch, from the number of rows that are trained on.

    concat: as the weights say. interleave_under and interleave_over: the weights are the chances with which the next
    row is taken from each set, until the first of them is used up, or until all are (`datasets.interleave_datasets`).
    """
    weights = {name: data.datasets[name] for name in rows}
    if data.mix_strategy == "concat":
        return weights
    total = sum(weights.values())
    chance = {name: weight / total for name, weight in weights.items()}
    lengths = [count / chance[name] for name, count in rows.items() if count]
    length = (min if data.mix_strategy == "interleave_under" else max)(lengths, default=0)
    return {name: chance[name] * length / count if count else 0.0 for name, count in rows.items()}
