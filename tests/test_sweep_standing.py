"""How a sweep stands, and where the page and the command line say it. Runs as training leaves them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.rundir import read_json, write_json
from engine.launch.workspace import Workplace
from engine.runs import compare, runs, sweep_standing
from engine.runs.run import Run
from engine.runs.sweep_standing import Budget, Measure
from tests.conftest import engine
from tests.past_runs import run_maker
from webui.compare_tab import tables_html
from webui.compare_tab.comparison import compared
from webui.compare_tab.view import View
from webui.runs_tab import head_html, table_html
from webui.words import Words

ENGLISH, CHINESE = Words("en"), Words("zh")
HOUR = 3600.0
Make = Callable[..., Run]


@pytest.fixture
def member(tmp_path: Path) -> Make:
    """Makes a run of a sweep with such last values of its curves, which has trained for half an hour on two GPUs."""
    make = run_maker(tmp_path)

    def member(
        name: str, sweep: str | None = "a", budget: float | None = 5, ended: str = "finished", **last: float
    ) -> Run:
        lines = [{"step": step, "epoch": step, "time": step, **last} for step in (1, 2)] if last else []
        run = make(name, lines, ended, method__r=len(list(tmp_path.glob("*/*/*"))) + 1)
        about = {"sweep": {"id": sweep, "budget_hours": budget, "values": {}}} if sweep else {}
        write_json(run.dir.request, read_json(run.dir.request) | about)
        write_json(run.dir.keeper, {"started": 1e9, "leases": ["GPU-0", "GPU-1"]})
        write_json(run.dir.exit, read_json(run.dir.exit) | {"ended": 1e9 + HOUR / 2, "attempt": 1})
        return runs.read(run.path, tmp_path)

    return member


def test_the_best_is_the_finished_run_with_the_best_measure_that_most_have(member: Make) -> None:
    good, worse = member("good", eval_loss=1.5, loss=9.0), member("worse", eval_loss=1.6, loss=0.1)
    stopped, other = member("stopped", ended="stopped", eval_loss=1.0), member("other", loss=0.5)
    silent = member("silent")
    sweep = [worse, silent, other, good, stopped]
    assert sweep_standing.ranked(sweep) == [stopped, good, worse, silent, other]
    assert sweep_standing.best_of(sweep) == good
    assert sweep_standing.measure(good) == Measure("eval_loss", 1.5)
    assert sweep_standing.best_of([silent]) is None
    alone, outside = member("alone", sweep="b", loss=0.1), member("outside", sweep=None, loss=0.1)
    assert sweep_standing.best_among([*sweep, alone, outside], [worse, alone, outside]) == {good.id}
    assert sweep_standing.best_among([*sweep, alone], [alone]) == set()  # there is nothing to compare it with
    costs = [Measure(curve, 2.0).cost for curve in ("eval_loss", "loss", "eval_rewards/margins", "mean_reward")]
    assert costs == [2, 2, -2, -2]


def test_hours_of_deleted_runs_count_towards_the_budget(member: Make, tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        member(name)
    member("of another", sweep="b")

    def used() -> Budget:
        return sweep_standing.budget(tmp_path, sweep_standing.members(tmp_path, "a"), 2e9)

    assert used() == Budget(5, pytest.approx(3.0))
    for name in ("of another", "x", "y"):
        runs.delete(runs.get(tmp_path, name))
        assert used().used == pytest.approx(3.0)  # though they ended years ago
    runs.delete(runs.get(tmp_path, "z"))
    member("of a third", sweep="c")
    runs.delete(runs.get(tmp_path, "of a third"))
    assert len(read_json(tmp_path / ".spent-hours.json")) == 0  # nothing is left to which they could count


def test_page_and_command_line_say_how_a_sweep_stands(member: Make, tmp_path: Path, workplace: Workplace) -> None:
    member("lonely", sweep=None, loss=0.1)
    best, other = member("<best>", loss=1.25), member("other", ended="failed", loss=1.5)
    line = head_html.head(other, tmp_path, ENGLISH)
    assert "<b>Sweep</b></span> · <span>2 runs, 2 ended</span> · <span>2 of 5 GPU hours used</span>" in line
    link = '<a href="?run=base/lora/%3Cbest%3E" data-run="base/lora/&lt;best&gt;">&lt;best&gt;</a>'
    assert f"<span>best: {link}</span> · <span>Loss 1.25</span>" in line
    assert "本次运行最佳" in head_html.head(best, tmp_path, CHINESE)
    assert "sweep" not in head_html.head(runs.get(tmp_path, "lonely"), tmp_path, ENGLISH)
    known = runs.find(tmp_path)
    table = table_html.table(known, ENGLISH, best=sweep_standing.best_among(known, known))
    assert re.findall(r'">([^<]+)</a> <span class="star"', table) == ["&lt;best&gt;"]
    here = Workplace(models=workplace.models, data=workplace.data, saves=tmp_path)
    assert re.search(r"loss 1\.2500\* base/lora/<best>\n", engine(here, "list").stdout)
    shown = engine(here, "show", "other").stdout
    assert f"Sweep: 2 runs, 2 ended; 2 of 5 GPU hours used; best: {best.id} (loss 1.25)\n" in shown


def test_of_a_large_sweep_the_best_runs_are_compared_and_marked_in_its_groups(member: Make, tmp_path: Path) -> None:
    sweep = [member(f"run {number:02}", loss=100.0 - number) for number in range(compare.MAX_RUNS_COMPARED + 5)]
    known = compare.training_runs(tmp_path)
    shown = compare.siblings(sweep[0], known)
    assert [run.title for run in shown] == ["run 00", *(f"run {number:02}" for number in range(6, 55))]
    assert compare.runs_of_sweep(shown, known) == 55
    assert compare.runs_of_sweep(shown[:2], known[:50]) is None
    comparison = compared(shown[:3], View(by="method.r"), sweep_standing.best_among(known, shown[-1:]))
    [groups] = re.findall(
        r'<section class="beside compare-groups">.*?</section>', tables_html.tables(comparison, ENGLISH)
    )
    assert '<td>100</td><td>94</td><td class="best">93</td>' in groups
