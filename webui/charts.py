"""Curves as inline SVG: pure functions from numbers to text, no library, no script needed to read them.

Colours come from the page's CSS variables, so that light and dark need no second picture. What the pointer finds
is in each figure's `data-points`; page.js shows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from engine.core.smoothing import SMOOTHING, exponential_moving_average
from webui.words import Words

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 14, 12, 34
MARK_LABEL_HEIGHT = 16  # of a histogram, the room above its bars in which its mark is named
MAX_COLUMNS_PER_CURVE = 300  # a curve is drawn through columns, each with its lowest and highest value
MAX_COLUMNS_PER_FIGURE = 4000  # of all its curves together, so that the text of fifty runs stays short, too
AXES = ("step", "epoch", "tokens", "time")
# Of overlaid runs, as page.css has them: no two of sixty are alike, and of the first twelve four are solid, four have
# dashes, four dots, for those who cannot tell all colours.
COLOUR_COUNT, DASH_COUNT, RUNS_PER_DASH = 12, 5, 4
# In this order, behind those that matter most to the stage; whatever else a run logs follows by name.
COMMON_CURVES = ("loss", "learning_rate", "grad_norm")
UNSMOOTHED = ("learning_rate", "num_tokens")  # have no noise to smooth; nor do the few points of a validation


@dataclass(frozen=True)
class Frame:
    """A picture's size in pixels, and the pixels in it where curves are drawn."""

    width: int
    height: int

    @property
    def right(self) -> int:
        return self.width - MARGIN_RIGHT

    @property
    def bottom(self) -> int:
        return self.height - MARGIN_BOTTOM


SMALL, WIDE = Frame(600, 250), Frame(1200, 420)


@dataclass(frozen=True)
class Line:
    """One curve of a chart. `role` names its CSS classes; one with `dots` has few points, which are never smoothed."""

    name: str
    role: str
    x: list[float]
    value: list[float]
    low: list[float]
    high: list[float]
    dots: bool = False


def charts(
    series: Mapping[str, Any],
    words: Words,
    x: str = "step",
    smoothing: float = SMOOTHING,
    log: bool = False,
    first: Sequence[str] = (),
) -> str:
    """Every curve of a run as a grid of figures, those named in `first` before the others; training and validation
    of the same quantity share one."""
    bases = {name.removeprefix("eval_") for name in series}
    ahead = dict.fromkeys((*first, *COMMON_CURVES))
    order = [name for name in ahead if name in bases] + sorted(bases - set(ahead))
    figures = [_figure(base, series, words, x, smoothing, log) for base in order]
    if not any(figures):
        return f'<p class="quiet">{escape(words(no_curves_word(series.values(), x)))}</p>'
    return f'<div class="charts">{"".join(figures)}</div>'


def no_curves_word(series: Iterable[Any], x: str) -> str:
    """The word for a chart without curves: nothing is logged yet, or not what the axis counts."""
    uncounted = any(len(curve.step) and not np.isfinite(getattr(curve, x)).any() for curve in series)
    return "curves-no-tokens" if x == "tokens" and uncounted else "curves-none"


def _figure(base: str, series: Mapping[str, Any], words: Words, x: str, smoothing: float, log: bool) -> str:
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
        title(base, words), lines, words, x, 0.0 if base in UNSMOOTHED else smoothing, log, legend, last=last
    )


def overlay(
    metric: str,
    runs: Sequence[tuple[str, str, Any]],
    words: Words,
    x: str = "step",
    smoothing: float = SMOOTHING,
    log: bool = False,
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """One curve of several runs in one figure: (name, CSS classes, series) of each. `legend`: (name, CSS classes) where
    the classes stand for something else than the runs. "" if there is nothing to draw."""
    dots = metric.startswith("eval_")
    lines = [line(series, x, role, name, log, dots) for name, role, series in runs]
    lines = [curve for curve in lines if curve.x]
    if not lines:
        return ""
    legend = legend or [(curve.name, curve.role) for curve in lines]
    smoothing = 0.0 if metric in UNSMOOTHED else smoothing
    columns = max(min(MAX_COLUMNS_PER_CURVE, MAX_COLUMNS_PER_FIGURE // len(lines)), 2)
    # What smoothing has taken away is told of a few; of many it would hide the curves.
    return chart(
        title(metric, words), lines, words, x, smoothing, log, legend, WIDE, columns, raw=len(lines) <= 3
    )


def run_classes(place: int) -> str:
    """CSS classes of the run at a place: its colour and its dashes."""
    return f"run c{place % COLOUR_COUNT} d{place // RUNS_PER_DASH % DASH_COUNT}"


def title(metric: str, words: Words) -> str:
    """What a curve is called, of a validation too; that of one of several rewards by the reward's name on the form."""
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
    return Line(name, role, *table[:, kept].tolist(), dots=dots)


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
) -> str:
    """One figure: title, legend, axes and curves, as HTML with an inline SVG. `legend` has (name, CSS classes); `raw`
    draws what was logged under a smoothed curve; `last` is written at the end of the title's line."""
    across = Scale.over((v for curve in lines for v in curve.x), MARGIN_LEFT, frame.right)
    up = Scale.over(
        (v for curve in lines for v in (*curve.low, *curve.high)), frame.bottom, MARGIN_TOP, log, room=0.04
    )
    body, points = [], []
    for curve in lines:
        smooth = curve.value if curve.dots else exponential_moving_average(curve.value, smoothing)
        body.append(_curve(curve, smooth, across, up, columns, raw))
        points.append(_points(curve, smooth, across, up, x, columns, words))
    text = words("chart-text", title=title, count=len(lines[0].x), last=short(lines[0].value[-1]))
    keys = "".join(f'<span class="key {role}">{escape(name)}</span>' for name, role in legend)
    return (
        f'<figure class="chart" data-points="{escape(json.dumps(points, ensure_ascii=False))}">'
        f"<figcaption><b>{escape(title)}</b>{keys}"
        f"{f'<output>{escape(last)}</output>' if last else ''}</figcaption>"
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(text)}">'
        f"{_axes(across, up, x, frame, words)}{''.join(body)}</svg></figure>"
    )


def histogram(edges: Sequence[float], counts: Sequence[int], mark: float, words: Words) -> str:
    """Rows by their length in tokens, with a line at the longest that is kept, or an arrow to it; "" without rows."""
    if not counts:
        return ""
    across = Scale(edges[0], max(edges[-1], 1), MARGIN_LEFT, SMALL.right)
    up = Scale(0, max(counts) * 1.06, SMALL.bottom, MARGIN_TOP + MARK_LABEL_HEIGHT)
    bars, points = [], {"role": "train", "name": words("stat-rows"), "x": [], "y": [], "at": [], "value": []}
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
    within = mark <= edges[-1]  # else the picture would be all margin: an arrow says where the line is
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
        f"{_axes(across, up, 'tokens', SMALL, words)}{''.join(bars)}{line}</svg></figure>"
    )


def sparkline(values: Sequence[float], width: int = 96, height: int = 24) -> str:
    """A word-sized curve. Empty text if there is nothing to draw."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    across = Scale(0, len(values) - 1, 1, width - 1)
    up = Scale.over(values, height - 2, 2)
    path = _path((across(i), up(value)) for i, value in enumerate(values))
    return f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true"><path d="{path}"/></svg>'


# ------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, log: bool = False, room: float = 0.0
    ) -> Scale:
        """A scale that shows every value, with `room` left at both ends as a share of the range."""
        values = list(values)
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= abs(high) * 1e-9:
            middle, half = low, (abs(low) * 0.1 or 0.5)
            low, high = middle - half, middle + half
        extra = (high - low) * room
        return cls(low - extra, high + extra, start, end, log)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 2, 5)):
            candidates = [m * 10.0**power for power in powers for m in steps]
            candidates = [tick for tick in candidates if self.low <= math.log10(tick) <= self.high]
            if len(candidates) >= 3:
                return candidates[:: math.ceil(len(candidates) / (count + 2))]
        return [tick for tick in ticks(10**self.low, 10**self.high, count) if tick > 0]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 × a power of ten) between `low` and `high`, about `count` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * m for m in (1, 2, 5) if power * m >= raw), power * 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 1.234, 0.00012 → 1.2e-4, 12345 → 12.3k."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """45 → 0:45, 4000 → 1:06:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------ drawing


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _columns(count: int, max_columns: int) -> list[range]:
    """Indices of the points, put into at most so many columns."""
    wide = max(1, math.ceil(count / max_columns))
    return [range(start, min(start + wide, count)) for start in range(0, count, wide)]


def _curve(
    curve: Line, smooth: Sequence[float], across: Scale, up: Scale, max_columns: int, with_raw: bool
) -> str:
    columns = _columns(len(curve.x), max_columns)
    if curve.dots:
        at = [(across(curve.x[column[-1]]), up(curve.value[column[-1]])) for column in columns]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at)
        return f'<g class="{curve.role} dots"><path d="{_path(at)}"/>{dots}</g>'
    raw = ""
    if with_raw and smooth != curve.value:
        # Each column goes down to its lowest and up to its highest value: no spike is lost by drawing fewer points.
        ends = (
            (column[0], min(curve.low[i] for i in column), max(curve.high[i] for i in column))
            for column in columns
        )
        pairs = (
            (x, y)
            for i, low, high in ends
            for x, y in ((curve.x[i], low), (curve.x[i], high))[: 1 + (high > low)]
        )
        raw = f'<path class="raw" d="{_path((across(x), up(y)) for x, y in pairs)}"/>'
    strong = _path((across(curve.x[column[-1]]), up(smooth[column[-1]])) for column in columns)
    dot = f'<circle cx="{across(curve.x[-1]):.1f}" cy="{up(smooth[-1]):.1f}" r="3"/>'
    return f'<g class="{curve.role}">{raw}<path d="{strong}"/>{dot}</g>'


def _points(
    curve: Line, smooth: Sequence[float], across: Scale, up: Scale, x: str, max_columns: int, words: Words
) -> dict[str, Any]:
    """What the pointer finds: pixel positions, the place on the axis and the value, for every column."""
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


def _axes(across: Scale, up: Scale, x: str, frame: Frame, words: Words) -> str:
    marks = []
    for tick in up.ticks(frame.height // 60):
        y = up(tick)
        marks.append(f'<line class="grid" x1="{MARGIN_LEFT}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{MARGIN_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    # A first or last label that would run out of the picture is left out rather than cut.
    for tick in _across_ticks(across, x):
        label = {"time": clock}.get(x, short)(tick)
        marks.append(
            f'<text x="{across(tick):.1f}" y="{frame.height - 14}" text-anchor="middle">{label}</text>'
        )
    marks.append(
        f'<text class="axis" x="{frame.right}" y="{frame.height - 1}" text-anchor="end">{escape(words(f"x-{x}"))}</text>'
    )
    marks.append(
        f'<line class="base" x1="{MARGIN_LEFT}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>'
    )
    return f'<g class="axes">{"".join(marks)}</g>'


def _across_ticks(across: Scale, x: str) -> list[float]:
    if x == "step":
        return [tick for tick in across.ticks(8) if abs(tick - round(tick)) < 1e-9]
    if x == "time":
        span = max((across.high - across.low) / 6, 1)
        step = next(
            (s for s in (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 86400) if s >= span), 86400
        )
        step *= max(1, math.ceil(span / step))
        return [i * step for i in range(math.ceil(across.low / step), math.floor(across.high / step) + 1)]
    return across.ticks(6)
