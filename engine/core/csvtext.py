"""Tables as CSV for spreadsheets."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet takes the rest of a cell for


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a byte order mark, by which a spreadsheet knows that it is UTF-8; no cell of text is a formula."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return "\ufeff" + text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet would compute the text. A number with a sign is what it is."""
    if not text.startswith(FORMULA_STARTS):
        return False
    with contextlib.suppress(ValueError):
        return not (math.isfinite(float(text)) and text == text.strip())
    return True
