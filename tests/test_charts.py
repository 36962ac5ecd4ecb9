"""Charts are pure: the same numbers give the same picture, and no number breaks it."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.core.smoothing import exponential_moving_average
from engine.core.stages import STAGES
from webui import charts
from webui.chart_scale import ticks
from webui.numbers import short
from webui.words import Words

EN = Words("en")


def series(values, step=1):
    value = np.asarray(values, dtype=float)
    steps = np.arange(1, len(value) + 1) * float(step)
    return SimpleNamespace(
        step=steps, epoch=steps / 100, time=steps * 2.5, tokens=steps * 64, value=value, low=value, high=value
    )


def pictures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_training_and_validation_loss_share_one_picture():
    html = charts.charts({"loss": series([3, 2, 1]), "eval_loss": series([2.5], 3), "grad_norm": series([1, 2])}, EN)
    assert len(pictures(html)) == 2
    assert "validation" in html


@pytest.mark.parametrize("x", charts.AXES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1, 1, 1],
        [0, 0],
        [-3, 5],
        [math.nan, math.nan],
        [1, math.inf, 2],
        [1e-30, 1e30],
        list(range(1, 5000)),
        [],
    ],
    ids=["one", "flat", "zero", "negative", "nan", "infinite", "wide", "long", "none"],
)
def test_no_numbers_break_a_picture(values, x, log):
    html = charts.charts({"loss": series(values)}, EN, x, 0.9, log)
    for picture in pictures(html):
        text = ElementTree.tostring(picture, encoding="unicode")
        assert "nan" not in text
        assert "inf" not in text


def test_curves_stay_inside_the_picture_and_spikes_survive_thinning():
    values = np.ones(5000)
    values[1234] = 100.0
    html = charts.charts({"loss": series(values)}, EN, smoothing=0.5)
    ys = [float(y) for path in re.findall(r' d="M([^"]+)"', html) for y in re.findall(r" (-?[\d.]+)", path)]
    assert min(ys) >= 0
    assert max(ys) <= charts.SMALL.height
    assert min(ys) < charts.SMALL.height * 0.15, "the spike is drawn"
    assert len(html) < 60_000


def test_the_curves_that_matter_to_the_stage_come_first():
    logged = dict.fromkeys(("loss", "grad_norm", "eval_rewards/margins", "rewards/margins", "entropy"), series([1, 2]))
    html = charts.charts(logged, EN, first=STAGES["dpo"].curves)
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", html)
    assert titles == ["Reward margin", "Loss", "Gradient norm", "Entropy"]


@pytest.mark.parametrize(
    ("words", "titles"), [(EN, ["Reward", "Reward: Exact match"]), (Words("zh"), ["奖励", "奖励：完全一致"])]
)
def test_one_of_several_rewards_is_called_as_on_the_form(words, titles):
    html = charts.charts(
        {"reward": series([1, 2]), "rewards/exact": series([0, 1])}, words, first=STAGES["grpo"].curves
    )
    assert re.findall(r"<figcaption><b>([^<]+)</b>", html) == titles


def test_the_name_of_a_curve_is_text_and_nothing_else():
    html = charts.charts({"<script>alert(1)</script>": series([1, 2])}, EN)
    assert "<script" not in html


def test_the_pointer_finds_the_values_that_are_drawn():
    html = charts.charts({"loss": series([3, 2, 1])}, EN, smoothing=0)
    points = json.loads(unescape(re.search(r'data-points="([^"]+)"', html)[1]))
    assert points[0]["value"] == ["3", "2", "1"]
    assert points[0]["at"][-1] == "Step 3"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-5, 5), (0.001, 0.002), (0, 12345), (1e-9, 2e-9)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-12 <= tick <= high + abs(high) * 1e-9 for tick in found)


def test_smoothing_starts_at_the_first_value_and_keeps_a_flat_line_flat():
    assert exponential_moving_average([5, 5, 5], 0.9) == pytest.approx([5, 5, 5])
    assert exponential_moving_average([1, 2, 3], 0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.23456, "1.235"),
        (0.00012, "1.2e-4"),
        (12345, "12.3k"),
        (2_590_000, "2.59M"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_spark_line_needs_two_points():
    assert charts.sparkline([1.0]) == ""
    assert charts.sparkline([math.nan, 1.0]) == ""
    assert "<svg" in charts.sparkline([3, 2, 1])


def test_a_length_limit_far_beyond_all_rows_is_told_though_its_line_is_out_of_the_picture():
    near, far = (charts.histogram([0, 10, 20], [3, 4], mark, EN) for mark in (15, 128))
    assert near.count("<line") == far.count("<line") + 1
    assert "max length 15<" in near
    assert "max length 128 →" in far


# ------------------------------------------------------------------------------------------ a part of the axis

PARTS = [
    ("step:10:20", "step", (10.0, 20.0)),
    ("time:1.5:3e2", "time", (1.5, 300.0)),
    ("step:10:20", "epoch", None),
    ("", "step", None),
    (None, "step", None),
    ("step:20:10", "step", None),
    ("step:a:b", "step", None),
    ("step:1", "step", None),
    ("step:1:2:3", "step", None),
    ("step:nan:2", "step", None),
    ("step:0:inf", "step", None),
    ("step:1:1", "step", None),
]


@pytest.mark.parametrize(("zoom", "x", "part"), PARTS)
def test_a_part_of_an_axis_is_read_or_is_all_of_it(zoom: str | None, x: str, part: Any) -> None:
    assert charts.part_of(zoom, x) == part


def test_a_part_shows_its_points_alone_smoothed_as_in_the_whole() -> None:
    x = [float(step) for step in range(100)]
    value = [math.sin(step) for step in x]
    curve = charts.Line("loss", "train", x, value, value, value)
    smooth = exponential_moving_average(value, 0.9)
    part, inside = charts._within(curve, smooth, (40.0, 49.0))
    assert part.x == x[40:50]
    assert (part.value, inside) == (value[40:50], list(smooth[40:50]))
    html = charts.chart("Loss", [curve], EN, "step", 0.9, part=(40.0, 49.0))
    assert 'data-across="40.0 49.0 52 586"' in html
    assert "<path" not in charts.chart("Loss", [curve], EN, "step", part=(200.0, 300.0))


def test_all_of_it_can_be_shown_again() -> None:
    curves = {"loss": series(range(10))}
    assert "zoom-out" not in charts.charts(curves, EN)
    assert "zoom-out" in charts.charts(curves, EN, part=(2.0, 5.0))
