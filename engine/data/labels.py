"""The words that data sets use for "good" and "bad", and numbers as weights."""

from __future__ import annotations

import math
from typing import Any

GOOD_WORDS = (
    "true", "yes", "y", "1", "+1", "good", "up", "thumbs_up", "like", "liked", "positive", "pos", "desirable",
    "chosen", "accept", "accepted", "preferred", "win", "是", "好", "赞", "对",
)  # fmt: skip
BAD_WORDS = (
    "false", "no", "n", "0", "-1", "bad", "down", "thumbs_down", "dislike", "disliked", "negative", "neg",
    "undesirable", "rejected", "reject", "dispreferred", "lose", "loss", "否", "坏", "踩", "错",
)  # fmt: skip
LABEL_OF_WORD = dict.fromkeys(GOOD_WORDS, True) | dict.fromkeys(BAD_WORDS, False)
LABEL_OF_NUMBER: dict[float, bool] = {1: True, 0: False, -1: False}


def label_of(value: Any) -> bool | None:
    """Whether a rating says good or bad: true/false, 1/0, +1/-1, or one of the words; None if it is neither."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return LABEL_OF_NUMBER.get(value)
    if isinstance(value, str):
        return LABEL_OF_WORD.get(value.strip().casefold().replace(" ", "_").removesuffix(".0"))
    return None


def weight_of(value: Any) -> float | None:
    """A weight as true/false or a number ≥ 0, or either as text; None if it is not one."""
    if isinstance(value, str):
        text = value.strip().casefold()
        if text in ("true", "false"):
            return float(text == "true")
        try:
            value = float(text)
        except ValueError:
            return None
    if not isinstance(value, (bool, int, float)):
        return None
    return float(value) if 0 <= value < math.inf else None
