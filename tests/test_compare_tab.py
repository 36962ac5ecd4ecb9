"""The handlers of the Compare tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gradio as gr
import pytest

from engine.core.rundir import append_lines, write_text
from engine.launch.workspace import Workplace
from engine.runs import compare
from engine.runs.runs import Run, delete
from tests.past_runs import falling, run_maker
from webui import charts
from webui.compare_tab.comparison import compared
from webui.compare_tab.comparison_panel import ComparisonPanel
from webui.compare_tab.runs_panel import RunsPanel
from webui.compare_tab.view import View
from webui.compare_tab.view_panel import ViewPanel
from webui.words import Words

ENGLISH = Words("en")
Make = Callable[..., Run]


@pytest.fixture
def past(tmp_path: Path) -> Make:
    return run_maker(tmp_path)


class Tab:
    """The panels, put together as the page does it."""

    def __init__(self, workplace: Workplace, words: Words = ENGLISH):
        with gr.Blocks():
            self.timer = gr.Timer(active=False)
            self.runs, self.view = RunsPanel(words, workplace), ViewPanel(words)
            self.comparison = ComparisonPanel(words, workplace, "/root", self.timer, self.runs, self.view)
            for panel in (self.runs, self.view, self.comparison):
                panel.layout()

    def draw(self, *ids: str, metric: str = "", x: str = "step", log: bool = False, by: str = "") -> dict[str, Any]:
        """What there is to see of these runs, by the names of the components."""
        updates = self.comparison.draw(list(ids), metric, x, 0.6, log, by)
        assert updates.keys() <= set(self.comparison.outputs)
        return {
            "note": updates[self.runs.note],
            "chart": updates[self.comparison.chart],
            "tables": updates[self.comparison.tables],
        }


@pytest.fixture
def tab(tmp_path: Path) -> Tab:
    return Tab(Workplace(saves=tmp_path))


def test_the_figure_has_a_curve_of_every_run_and_the_pointer_finds_all(past: Make, tab: Tab) -> None:
    runs = [past(f"run {number} <b>", falling(200, end=number)) for number in range(10)]
    shown = tab.draw(*(run.id for run in runs), metric="eval_loss", x="tokens")["chart"]
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", shown, re.DOTALL)[0])
    drawn = [curve.get("class") for curve in svg.findall("g")[1:]]
    assert len(set(drawn)) == 10
    points = json.loads(unescape(re.search(r'data-points="([^"]+)"', shown)[1]))
    assert [curve["name"] for curve in points] == [run.spec.name for run in runs]
    assert points[0]["at"][-1] == "Tokens 102k"
    assert "<b>" not in re.sub(r"</?figcaption>|<b>Loss \(validation\)</b>", "", shown)


def test_no_two_of_fifty_runs_look_alike() -> None:
    assert len({charts.run_classes(place) for place in range(compare.MAX_RUNS_COMPARED)}) == compare.MAX_RUNS_COMPARED


def test_grouped_runs_have_the_colour_of_their_group(past: Make, tab: Tab) -> None:
    runs = [past(f"r{rank}-{seed}", falling(50, end=seed), method__r=rank) for rank in (4, 64) for seed in (1, 2)]
    shown = tab.draw(*(run.id for run in runs), by="method.r")
    keys = re.findall(r'<span class="key run (c\d)[^>]*>([^<]+)<', shown["chart"])
    assert keys == [("c0", "4"), ("c1", "64")]
    assert re.findall(r'<g class="run (c\d)', shown["chart"]) == ["c0", "c0", "c1", "c1"]
    assert "±" in shown["tables"]
    assert '<td class="best">' in shown["tables"]


def test_whatever_is_chosen_there_is_an_answer(past: Make, tab: Tab) -> None:
    lone, silent = past("one", falling(30)), past("silent", outcome=None)
    losses = (math.nan, None, math.inf)
    odd = past("odd", [{"step": step, "epoch": 0.1, "time": 2.0, "loss": loss} for step, loss in enumerate(losses)])
    preferring = past("pairs", falling(30, **{"rewards/margins": float}), stage="dpo")
    broken = past("broken", falling(30))
    write_text(broken.dir.spec, "{")
    gone = past("gone", falling(30))
    delete(gone)
    assert "Choose runs" in tab.draw()["note"]
    assert f"No longer available: {gone.id}" in tab.draw(gone.id)["note"]
    assert "second run" in tab.draw(lone.id)["tables"]
    assert "None of these runs" in tab.draw(silent.id)["chart"]
    assert "<svg" not in tab.draw(odd.id)["chart"]
    assert "Nothing to plot for: one" in tab.draw(lone.id, preferring.id, metric="rewards/margins")["note"]
    assert "Settings cannot be read: broken" in tab.draw(lone.id, broken.id)["note"]
    everything = [run.id for run in (lone, silent, odd, preferring, broken, gone)]
    for x in charts.AXES:
        for log in (False, True):
            for by in ("", compare.BY_NAME, "stage", "no.such.setting"):
                shown = tab.draw(*everything, "../../etc", "", metric="no such curve", x=x, log=log, by=by)
                assert not re.search(r"[ML ](nan|inf)", shown["chart"])


def test_fifty_runs_are_drawn_and_not_one_more(past: Make, tab: Tab) -> None:
    runs = [past(f"run-{number}", falling(300, end=number)) for number in range(55)]
    shown = tab.draw(*(run.id for run in runs))
    assert shown["chart"].count('<g class="run') == 50
    assert len(shown["chart"]) < 1_000_000


def test_a_poll_of_runs_that_stand_still_answers_nothing(past: Make, tab: Tab) -> None:
    run = past("a", falling(30), outcome=None)
    comparison, controls = tab.comparison, ([run.id], "loss", "step", 0.6, False, "")
    stamp = comparison.tick("", *controls)[comparison.stamp]
    assert comparison.tick(stamp, *controls) == gr.skip()
    append_lines(run.dir.metrics, [{"step": 31, "epoch": 3.1, "time": 62.0, "loss": 0.5}])
    assert "<svg" in comparison.tick(stamp, *controls)[comparison.chart]


# ------------------------------------------------------------------------------------------ the controls


def test_one_arrives_at_the_runs_there_are(past: Make, tab: Tab) -> None:
    first, second = past("first", falling(30)), past("second", falling(30))
    updates = tab.comparison.arrive([first.id, "base/lora/gone"], None, None, 0.6, False, None)
    assert updates[tab.runs.runs] == gr.update(
        choices=[("second · base", second.id), ("first · base", first.id)],
        value=[first.id],
        info="Up to 50. Type to search.",
    )
    assert "No longer available: base/lora/gone" in updates[tab.runs.note]
    assert "<svg" in updates[tab.comparison.chart]
    assert updates.keys() == {tab.runs.runs, *tab.comparison.outputs}


def test_the_controls_offer_what_these_runs_have(past: Make, tab: Tab) -> None:
    runs = past("a", falling(30)), past("b", falling(30), method__r=64)
    ids = [run.id for run in runs]
    updates = tab.comparison.draw(ids, "rewards/margins", "nowhere", "steep", None, "training.seed")
    assert updates[tab.view.row]["visible"] is True
    assert updates[tab.view.metric]["value"] == "loss"
    assert [name for _, name in updates[tab.view.metric]["choices"]] == ["loss", "eval_loss", "num_tokens"]
    assert updates[tab.view.by]["value"] == ""
    assert [path for _, path in updates[tab.view.by]["choices"]] == ["", "name", "method.r"]
    kept = tab.comparison.draw(ids, "eval_loss", "time", 0.2, True, "method.r")
    assert (kept[tab.view.metric]["value"], kept[tab.view.by]["value"]) == ("eval_loss", "method.r")


def test_the_timer_goes_while_a_run_does(past: Make, tab: Tab) -> None:
    finished, waiting = past("finished", falling(30)), past("waiting", falling(30), outcome=None)
    (waiting.dir.path / "keeper.json").unlink()  # it has not begun
    for ids, active in (([finished.id], False), ([finished.id, waiting.id], True), ([], False)):
        updates = tab.comparison.draw(ids, "", "step", 0.6, False, "")
        assert updates[tab.timer].active is active
        ticked = tab.comparison.tick("of before", ids, "", "step", 0.6, False, "")
        assert (tab.timer in ticked) is not active  # a tick ends it, and never sets it going: its tab may be left


def test_nothing_is_shown_where_nothing_is_chosen(tab: Tab) -> None:
    updates = tab.comparison.draw(None, "loss", "step", 0.6, False, "name")
    assert (updates[tab.comparison.chart], updates[tab.comparison.tables]) == ("", "")
    assert updates[tab.view.row]["visible"] is False
    assert tab.view.metric not in updates  # what one has chosen stays for the next runs


def test_an_address_is_read_into_the_controls(past: Make, tab: Tab) -> None:
    run = past("a", falling(30))
    address = f"tab=compare&runs={run.id}&runs=base/lora/gone&curve=eval_loss&x=tokens&smooth=0.25&log=true&by=name"
    updates = tab.comparison.from_address(address)
    assert updates.keys() == {tab.runs.runs, *tab.view.inputs}
    assert updates[tab.runs.runs]["value"] == [run.id, "base/lora/gone"]
    assert ("base/lora/gone", "base/lora/gone") in updates[tab.runs.runs]["choices"]
    assert (updates[tab.view.x], updates[tab.view.smoothing], updates[tab.view.log]) == ("tokens", 0.25, True)
    for control, value in ((tab.view.metric, "eval_loss"), (tab.view.by, "name")):
        assert updates[control] == gr.update(choices=[(value, value)], value=value)
    assert tab.comparison.from_address("tab=compare&curve=loss") == {}


@pytest.mark.parametrize(
    ("text", "smoothing"), [("0.3", 0.3), ("7", 0.99), ("-1", 0), ("nan", 0.6), ("", 0.6), ("very", 0.6)]
)
def test_a_smoothing_is_held_within_its_bounds(text: str, smoothing: float) -> None:
    assert View.of_address({"smooth": [text]}).smoothing == smoothing
    assert View.of_controls(None, "up", text, 0, None) == View(smoothing=smoothing)


def test_a_run_is_compared_with_those_like_it(past: Make, tab: Tab) -> None:
    older, run = past("older", falling(30)), past("run", falling(30))
    past("of another stage", falling(30), stage="dpo")
    updates = tab.comparison.with_siblings(run)
    assert updates[tab.runs.runs]["value"] == [run.id, older.id]
    assert (updates[tab.view.x], updates[tab.view.log]) == ("step", False)
    assert not updates.keys() & {
        tab.view.metric,
        tab.view.by,
    }  # what they are is told once the runs are drawn


def test_curves_come_in_the_order_of_what_their_stages_are_about(past: Make) -> None:
    lines = falling(20, aardvark=float, **{"rewards/margins": float, "grad_norm": float})
    comparison = compared([past("a", lines, stage="dpo")], View())
    assert comparison.metrics[0] == comparison.view.metric
    assert comparison.metrics.index("rewards/margins") < comparison.metrics.index("grad_norm")
    assert comparison.metrics[-2:] == ["aardvark", "num_tokens"]
    assert len(set(comparison.metrics)) == len(comparison.metrics)


def test_the_tables_are_csv_too_with_numbers_as_they_are(past: Make, tab: Tab) -> None:
    runs = past("=1+1", [{"step": 1, "epoch": 0.1, "time": 2.0, "loss": 1 / 3}]), past("b", method__r=64)
    tables = tab.draw(*(run.id for run in runs))["tables"]
    text = unescape(re.search(r'<pre id="compare-csv" hidden>(.*?)</pre>', tables, re.DOTALL)[1])
    rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    assert rows[0] == ["", "'=1+1", "b"]
    assert repr(1 / 3) in [cell for row in rows for cell in row]
    assert [ENGLISH.label("method.r"), "16", "64"] in rows
    assert 'href="/root/compare/curves.csv?runs=base%2Flora%2F' in tab.draw(runs[0].id)["chart"]


def test_a_part_of_the_axis_is_shown_alone(past: Make, tab: Tab) -> None:
    run = past("a", falling(30))
    controls = ([run.id], "loss", "step", 0.0, False, "")
    whole, part = (tab.comparison.draw(*controls, zoom)[tab.comparison.chart] for zoom in ("", "step:10:20"))
    assert 'data-zoom="compare-zoom"' in whole
    assert "zoom-out" not in whole
    assert 'data-across="10.0 20.0' in part
    assert "zoom-out" in part
    assert tab.comparison.draw(*controls, "epoch:1:2")[tab.comparison.chart] == whole
