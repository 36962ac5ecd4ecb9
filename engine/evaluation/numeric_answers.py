"""The number that an answer comes to."""

from __future__ import annotations

import re
from decimal import Decimal

# 7 · -3 · 1,234.5 · .5 · 2e-3; a minus sign after a digit is a dash, as in 3-5.
NUMBER = re.compile(r"(?<![\d.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
ASCII_SIGNS = str.maketrans("−－＋．", "--+.")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, with thousands separators; a unit or a % after it is ignored."""
    matches = NUMBER.findall(text.translate(ASCII_SIGNS))
    return Decimal(matches[-1].replace(",", "")) if matches else None
