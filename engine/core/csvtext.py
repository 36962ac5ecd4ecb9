"""Tables as CSV for spreadsheets."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # a cell that begins like this is a formula to a spreadsheet


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a byte order mark, which tells spreadsheets that it is UTF-8. Text cells never become formulas."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return "\ufeff" + text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet would evaluate the text as a formula. Signed numbers are harmless."""
    if not text.startswith(FORMULA_STARTS):
        return False
    with contextlib.suppress(ValueError):
        return not (math.isfinite(float(text)) and text == text.strip())
    return True
