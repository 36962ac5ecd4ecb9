"""The curves and axes of a chart as SVG, and the data that the pointer shows in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from webui.chart_scale import MARGIN_LEFT, Frame, Scale
from webui.numbers import clock, short
from webui.words import Words


@dataclass(frozen=True)
class Line:
    """One curve of a chart. `role` determines its CSS classes; one with `dots` has few points, which are never
    smoothed."""

    name: str
    role: str
    x: list[float]
    value: list[float]
    low: list[float]
    high: list[float]
    dots: bool = False


def path_data(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _columns(count: int, max_columns: int) -> list[range]:
    """Indices of the points, in at most so many columns."""
    wide = max(1, math.ceil(count / max_columns))
    return [range(start, min(start + wide, count)) for start in range(0, count, wide)]


def curve_svg(curve: Line, smooth: Sequence[float], across: Scale, up: Scale, max_columns: int, with_raw: bool) -> str:
    """The curve through at most `max_columns` points, `with_raw` above the unsmoothed values."""
    columns = _columns(len(curve.x), max_columns)
    if curve.dots:
        at = [(across(curve.x[column[-1]]), up(curve.value[column[-1]])) for column in columns]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at)
        return f'<g class="{curve.role} dots"><path d="{path_data(at)}"/>{dots}</g>'
    raw = ""
    if with_raw and smooth != curve.value:
        # Each column covers its lowest and highest value: no spike is lost by drawing fewer points.
        ends = (
            (column[0], min(curve.low[i] for i in column), max(curve.high[i] for i in column)) for column in columns
        )
        pairs = (
            (x, y) for i, low, high in ends for x, y in ((curve.x[i], low), (curve.x[i], high))[: 1 + (high > low)]
        )
        raw = f'<path class="raw" d="{path_data((across(x), up(y)) for x, y in pairs)}"/>'
    strong = path_data((across(curve.x[column[-1]]), up(smooth[column[-1]])) for column in columns)
    dot = f'<circle cx="{across(curve.x[-1]):.1f}" cy="{up(smooth[-1]):.1f}" r="3"/>'
    return f'<g class="{curve.role}">{raw}<path d="{strong}"/>{dot}</g>'


def pointer_points(
    curve: Line, smooth: Sequence[float], across: Scale, up: Scale, x: str, max_columns: int, words: Words
) -> dict[str, Any]:
    """What the pointer shows: pixel positions, the place on the axis and the value, for every column."""
    at = [column[-1] for column in _columns(len(curve.x), max_columns)]
    return {
        "role": curve.role,
        "name": curve.name,
        "x": [round(across(curve.x[i]), 1) for i in at],
        "y": [round(up(smooth[i]), 1) for i in at],
        "at": [f"{words(f'x-{x}')} {_place(curve.x[i], x)}" for i in at],
        "value": [short(smooth[i]) for i in at],
    }


def _place(value: float, x: str) -> str:
    return {"time": clock, "epoch": lambda v: f"{v:.2f}", "tokens": short}.get(x, lambda v: f"{v:.0f}")(value)


def axes_svg(across: Scale, up: Scale, x: str, frame: Frame, words: Words) -> str:
    """Grid, labels and the name of the axis at the bottom: a key of `charts.AXES`."""
    marks = []
    for tick in up.ticks(frame.height // 60):
        y = up(tick)
        marks.append(f'<line class="grid" x1="{MARGIN_LEFT}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{MARGIN_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    # A first or last label that would exceed the picture is left out instead of cut.
    for tick in _across_ticks(across, x):
        label = {"time": clock}.get(x, short)(tick)
        marks.append(f'<text x="{across(tick):.1f}" y="{frame.height - 14}" text-anchor="middle">{label}</text>')
    marks.append(
        f'<text class="axis" x="{frame.right}" y="{frame.height - 1}" text-anchor="end">'
        f"{escape(words(f'x-{x}'))}</text>"
    )
    marks.append(f'<line class="base" x1="{MARGIN_LEFT}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    return f'<g class="axes">{"".join(marks)}</g>'


def _across_ticks(across: Scale, x: str) -> list[float]:
    if x == "step":
        return [tick for tick in across.ticks(8) if abs(tick - round(tick)) < 1e-9]
    if x == "time":
        span = max((across.high - across.low) / 6, 1)
        step = next((s for s in (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 86400) if s >= span), 86400)
        step *= max(1, math.ceil(span / step))
        return [i * step for i in range(math.ceil(across.low / step), math.floor(across.high / step) + 1)]
    return across.ticks(6)
