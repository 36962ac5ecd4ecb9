"""How much each answer of a row counts in the loss: from the row's weights to spans of tokens, and to a weight column.

A row's `weights` has a number for each of its answers, in order (`engine.data.loss_marks`); 0 means not trained, 1
means the usual weight. The loss of a step is

    L = Σ w(t) · -log p(t) / N,    over the trained tokens t, those with w(t) > 0; N of them in the step

with N counted over all micro-batches and all processes, as transformers and TRL count it without weights. N is not the
sum of the weights: if it were, a batch of one row would have the same effect whatever the row's weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Span = tuple[int, int]
Weights = Sequence[float]
WEIGHTS_TYPE = pa.list_(pa.float32())


def weighted_spans(
    spans: Sequence[Span], weights: Weights | None, length: int, train_on: str
) -> tuple[list[Span], list[float] | None]:
    """The trained spans among `length` tokens whose answers are at `spans`, and the weight of each; None if all are 1.

    A weight of 0 removes a span, whatever `train_on` says. With "everything", tokens outside answers have weight 1.
    """
    if weights is None:
        spans = [(0, length)] if train_on == "everything" else spans
        return list(spans[-1:] if train_on == "last_answer" else spans), None
    pairs = list(zip(spans, weights, strict=False))  # a truncated row has fewer spans
    if train_on == "last_answer":
        pairs = pairs[-1:]
    if train_on == "everything":
        pairs = _with_gaps(pairs, length)
    pairs = [(span, weight) for span, weight in pairs if weight > 0]
    kept = [weight for _, weight in pairs]
    return [span for span, _ in pairs], None if all(weight == 1 for weight in kept) else kept


def spans_without(
    spans: Sequence[Span], weights: Weights | None, left_out: Sequence[Span]
) -> tuple[list[Span], list[float] | None]:
    """The spans with their weights, except for what is in one of `left_out`, which are sorted and do not overlap."""
    kept: list[Span] = []
    kept_weights: list[float] = []
    for (begin, end), weight in zip(spans, weights or [1.0] * len(spans), strict=True):
        inside = [(first, last) for first, last in left_out if first < end and last > begin]
        edges = [begin, *(edge for span in inside for edge in span), end]
        parts = [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
        kept += parts
        kept_weights += [weight] * len(parts)
    return kept, None if weights is None else kept_weights


def _with_gaps(pairs: Sequence[tuple[Span, float]], length: int) -> list[tuple[Span, float]]:
    """The spans and what is between them, which has weight 1."""
    filled: list[tuple[Span, float]] = []
    at = 0
    for (begin, end), weight in pairs:
        filled += [((at, begin), 1.0), ((begin, end), weight)]
        at = end
    return [((begin, end), weight) for (begin, end), weight in [*filled, ((at, length), 1.0)] if begin < end]


def without_oldest(row: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The row without its messages from number `begin` to `end`, and without the weights of the answers in them."""
    messages, weights = row["messages"], row.get("weights")
    shorter = {**row, "messages": messages[:begin] + messages[end:]}
    if weights is not None:
        before, inside = (
            sum(message["role"] == "assistant" for message in part) for part in (messages[:begin], messages[begin:end])
        )
        shorter["weights"] = [*weights[:before], *weights[before + inside :]]
    return shorter


def weights_column(labels: pa.ListArray, ignored: int, examples: Sequence[Any]) -> pa.ListArray:
    """The weight of each token's loss: that of its span for examples with weights, 1 for other trained tokens,
    otherwise 0."""
    offsets = labels.offsets.to_numpy()
    weights = (labels.values.to_numpy() != ignored).astype(np.float32)
    for start, example in zip(offsets.tolist(), examples, strict=False):
        for (begin, end), weight in zip(example.trained, example.weights or (), strict=False):
            weights[start + begin : start + end] = weight
    return pa.ListArray.from_arrays(labels.offsets, pa.array(weights))
