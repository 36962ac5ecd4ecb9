"""Curves as inline SVG: pure functions from numbers to text, without a library, and readable without a script.

Colours come from the page's CSS variables, so that light and dark mode use the same chart. The data that the pointer
shows is in each chart's `data-points`; page.js displays it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from engine.core.smoothing import SMOOTHING, exponential_moving_average
from webui.chart_drawing import Line, axes_svg, curve_svg, path_data, pointer_points
from webui.chart_scale import MARGIN_LEFT, MARGIN_TOP, SMALL, WIDE, Frame, Scale
from webui.numbers import short
from webui.words import Words

MARK_LABEL_HEIGHT = 16  # of a histogram, the room above its bars for the label of its mark
MAX_COLUMNS_PER_CURVE = 300  # a curve is drawn through columns, each with its lowest and highest value
MAX_COLUMNS_PER_FIGURE = 4000  # of all curves together, so that the text of fifty runs stays short
AXES = ("step", "epoch", "tokens", "time")
Part = tuple[float, float] | None  # of an axis, in its unit; None: all of it
# Of overlaid runs, as defined in page.css: no two of sixty are alike, and of the first twelve four are solid, four
# dashed and four dotted, for readers who cannot distinguish all colours.
COLOUR_COUNT, DASH_COUNT, RUNS_PER_DASH = 12, 5, 4
# In this order, after those that matter most to the stage; all other curves follow by name.
COMMON_CURVES = ("loss", "learning_rate", "grad_norm")
UNSMOOTHED = ("learning_rate", "num_tokens")  # have no noise to smooth; nor do the few points of a validation


def charts(
    series: Mapping[str, Any],
    words: Words,
    x: str = "step",
    smoothing: float = SMOOTHING,
    log: bool = False,
    first: Sequence[str] = (),
    part: Part = None,
) -> str:
    """Every curve of a run as a grid of charts, those named in `first` before the others; training and validation of
    the same quantity share one. `part`: only between these two places of the axis."""
    bases = {name.removeprefix("eval_") for name in series}
    ahead = dict.fromkeys((*first, *COMMON_CURVES))
    order = [name for name in ahead if name in bases] + sorted(bases - set(ahead))
    figures = [_figure(base, series, words, x, smoothing, log, part) for base in order]
    if not any(figures):
        return f'<p class="quiet">{escape(words(no_curves_word(series.values(), x)))}</p>'
    return zoomable(f'<div class="charts">{"".join(figures)}</div>', "curves-zoom", x, part, words)


def zoomable(figures: str, field: str, x: str, part: Part, words: Words) -> str:
    """Charts of which a part can be selected by dragging: page.js writes it into the field with that id (see
    `part_of`)."""
    back = f'<button type="button" class="zoom-out">{escape(words("zoom-out"))}</button>' if part else ""
    return f'<div class="zoomable" data-zoom="{field}" data-axis="{escape(x)}">{back}{figures}</div>'


def no_curves_word(series: Iterable[Any], x: str) -> str:
    """The message for a chart without curves: nothing is logged yet, or not what the axis counts."""
    uncounted = any(len(curve.step) and not np.isfinite(getattr(curve, x)).any() for curve in series)
    return f"curves-no-{x}" if x in ("tokens", "time") and uncounted else "curves-none"


def part_of(zoom: str | None, x: str) -> Part:
    """The part of the axis `x` in "axis:low:high"; None, which means all of it, for another axis or any other text."""
    axis, _, numbers = (zoom or "").partition(":")
    try:
        low, high = map(float, numbers.split(":"))
    except ValueError:
        return None
    return (low, high) if axis == x and low < high and math.isfinite(high - low) else None


def _figure(base: str, series: Mapping[str, Any], words: Words, x: str, smoothing: float, log: bool, part: Part) -> str:
    roles = {base: ("train", words("legend-train")), f"eval_{base}": ("eval", words("legend-eval"))}
    lines = [
        line(series[name], x, role, called, log, dots=role == "eval")
        for name, (role, called) in roles.items()
        if name in series
    ]
    lines = [curve for curve in lines if curve.x]
    if not lines:
        return ""
    last = short(lines[0].value[-1])
    legend = [(curve.name, curve.role) for curve in lines] if len(lines) > 1 else []
    return chart(
        title(base, words),
        lines,
        words,
        x,
        0.0 if base in UNSMOOTHED else smoothing,
        log,
        legend,
        last=last,
        part=part,
    )


def overlay(
    metric: str,
    runs: Sequence[tuple[str, str, Any]],
    words: Words,
    x: str = "step",
    smoothing: float = SMOOTHING,
    log: bool = False,
    legend: Sequence[tuple[str, str]] = (),
    part: Part = None,
) -> str:
    """One curve of several runs in one chart: (name, CSS classes, series) of each. `legend`: (name, CSS classes) if the
    classes stand for something else than the runs. "" if there is nothing to draw."""
    dots = metric.startswith("eval_")
    lines = [line(series, x, role, name, log, dots) for name, role, series in runs]
    lines = [curve for curve in lines if curve.x]
    if not lines:
        return ""
    legend = legend or [(curve.name, curve.role) for curve in lines]
    smoothing = 0.0 if metric in UNSMOOTHED else smoothing
    columns = max(min(MAX_COLUMNS_PER_CURVE, MAX_COLUMNS_PER_FIGURE // len(lines)), 2)
    # The unsmoothed values of a few runs are shown; those of many would hide the curves.
    return chart(
        title(metric, words),
        lines,
        words,
        x,
        smoothing,
        log,
        legend,
        WIDE,
        columns,
        raw=len(lines) <= 3,
        part=part,
    )


def run_classes(place: int) -> str:
    """CSS classes of the run at a place: its colour and its dashes."""
    return f"run c{place % COLOUR_COUNT} d{place // RUNS_PER_DASH % DASH_COUNT}"


def title(metric: str, words: Words) -> str:
    """The title of a curve, also of validation; that of one of several rewards contains the reward's name on the
    form."""
    base = metric.removeprefix("eval_")
    if base != metric:
        return words("curve-eval", title=title(base, words))
    if words.knows(f"curve-{base}"):
        return words(f"curve-{base}")
    if base.startswith("rewards/"):
        return words("curve-one-reward", name=words.choice("stage.rewards", base.removeprefix("rewards/")))
    return base.replace("_", " ")


def line(series: Any, x: str, role: str, name: str, log: bool = False, dots: bool = False) -> Line:
    """The finite points of a series; on a log scale only the positive ones."""
    table = np.stack([getattr(series, x if x in AXES else "step"), series.value, series.low, series.high])
    kept = np.isfinite(table).all(0)
    if log:
        kept &= (table[1:] > 0).all(0)
    at, value, low, high = table[:, kept].tolist()
    return Line(name, role, at, value, low, high, dots)


def chart(
    title: str,
    lines: Sequence[Line],
    words: Words,
    x: str,
    smoothing: float = 0.0,
    log: bool = False,
    legend: Sequence[tuple[str, str]] = (),
    frame: Frame = SMALL,
    columns: int = MAX_COLUMNS_PER_CURVE,
    raw: bool = True,
    last: str = "",
    part: Part = None,
) -> str:
    """One chart: title, legend, axes and curves, as HTML with an inline SVG. `legend` has (name, CSS classes); `raw`
    draws the unsmoothed values below a curve; `last` is written at the end of the title's line; `part` is the shown
    part of the axis."""
    smoothed = [
        (curve, curve.value if curve.dots else exponential_moving_average(curve.value, smoothing)) for curve in lines
    ]
    shown = [pair for pair in (_within(*pair, part) for pair in smoothed) if pair[0].x]
    across = Scale.over(part or (v for curve, _ in shown for v in curve.x), MARGIN_LEFT, frame.right)
    heights = [v for curve, _ in shown for v in (*curve.low, *curve.high)] or [1.0]
    up = Scale.over(heights, frame.bottom, MARGIN_TOP, log, room=0.04)
    body, points = [], []
    for curve, smooth in shown:
        body.append(curve_svg(curve, smooth, across, up, columns, raw))
        points.append(pointer_points(curve, smooth, across, up, x, columns, words))
    text = words("chart-text", title=title, count=len(lines[0].x), last=short(lines[0].value[-1]))
    keys = "".join(f'<span class="key {role}">{escape(name)}</span>' for name, role in legend)
    return (
        f'<figure class="chart" data-points="{escape(json.dumps(points, ensure_ascii=False))}">'
        f"<figcaption><b>{escape(title)}</b>{keys}"
        f"{f'<output>{escape(last)}</output>' if last else ''}</figcaption>"
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(text)}" '
        f'data-across="{across.low!r} {across.high!r} {across.start} {across.end}">'
        f"{axes_svg(across, up, x, frame, words)}{''.join(body)}</svg></figure>"
    )


def _within(curve: Line, smooth: Sequence[float], part: Part) -> tuple[Line, list[float]]:
    """The points of a curve in a part of the axis. The whole curve is smoothed first, so that a part begins with the
    right value."""
    if part is None:
        return curve, list(smooth)
    inside = [i for i, x in enumerate(curve.x) if part[0] <= x <= part[1]]
    x, value, low, high = ([column[i] for i in inside] for column in (curve.x, curve.value, curve.low, curve.high))
    return Line(curve.name, curve.role, x, value, low, high, curve.dots), [smooth[i] for i in inside]


def histogram(edges: Sequence[float], counts: Sequence[int], mark: float, words: Words) -> str:
    """Rows by their length in tokens, with a line at the maximum length, or an arrow to it; "" without rows."""
    if not counts:
        return ""
    across = Scale(edges[0], max(edges[-1], 1), MARGIN_LEFT, SMALL.right)
    up = Scale(0, max(counts) * 1.06, SMALL.bottom, MARGIN_TOP + MARK_LABEL_HEIGHT)
    bars: list[str] = []
    points: dict[str, Any] = {
        "role": "train",
        "name": words("stat-rows"),
        "x": [],
        "y": [],
        "at": [],
        "value": [],
    }
    for begin, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        left, right, top = across(begin) + 0.5, across(end) - 0.5, up(count)
        beyond = " beyond" if begin >= mark else ""
        bars.append(
            f'<rect class="count{beyond}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" '
            f'height="{SMALL.bottom - top:.1f}"/>'
        )
        points["x"].append(round((left + right) / 2, 1))
        points["y"].append(round(top, 1))
        points["at"].append(words("count-tokens", count=f"{begin:,.0f}–{end:,.0f}"))
        points["value"].append(f"{count:,}")
    within = mark <= edges[-1]  # otherwise the chart would be mostly empty: an arrow shows where the line is
    x = across(mark) if within else SMALL.right
    anchor, text_x = ("end", x - 6) if x > SMALL.width / 2 else ("start", x + 6)
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN_TOP}" y2="{SMALL.bottom}"/>' if within else ""
    label = words("mark-max-length", length=f"{mark:,}") + ("" if within else " →")
    line = (
        f'<g class="mark">{line}<text x="{text_x:.1f}" y="{MARGIN_TOP + 10}" text-anchor="{anchor}">'
        f"{escape(label)}</text></g>"
    )
    heading = words("lengths-title")
    text = words("chart-text", title=heading, count=len(counts), last=f"{counts[-1]:,}")
    return (
        f'<figure class="chart lengths" data-points="{escape(json.dumps([points], ensure_ascii=False))}">'
        f"<figcaption><b>{escape(heading)}</b></figcaption>"
        f'<svg viewBox="0 0 {SMALL.width} {SMALL.height}" role="img" aria-label="{escape(text)}">'
        f"{axes_svg(across, up, 'tokens', SMALL, words)}{''.join(bars)}{line}</svg></figure>"
    )


def sparkline(values: Sequence[float], width: int = 96, height: int = 24) -> str:
    """A word-sized curve. Empty text if there is nothing to draw."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    across = Scale(0, len(values) - 1, 1, width - 1)
    up = Scale.over(values, height - 2, 2)
    path = path_data((across(i), up(value)) for i, value in enumerate(values))
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<path d="{path}"/></svg>'
    )
