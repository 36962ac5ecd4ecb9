"""The handlers of the Runs tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.core import hardware
from engine.core.rundir import RunDir, write_json
from engine.launch.workspace import Workplace
from engine.runs import queue_order, runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.past_runs import falling, past_run
from tests.slurm_commands import stand_in_commands
from webui import charts, queue_html
from webui.panels import Updates
from webui.people import note_person
from webui.runs_tab import head_html
from webui.runs_tab.buttons_panel import ButtonsPanel
from webui.runs_tab.curves_panel import CurvesPanel
from webui.runs_tab.head_panel import HeadPanel
from webui.runs_tab.import_panel import ImportPanel
from webui.runs_tab.output_panel import OutputPanel
from webui.runs_tab.panel import Context, CurveView
from webui.runs_tab.queue_panel import QueuePanel
from webui.runs_tab.resume_panel import ResumePanel
from webui.runs_tab.run_actions import RunActions
from webui.runs_tab.run_view import ENDED_POLL_SECONDS, RunView
from webui.runs_tab.table_panel import TABLE_ROWS, TablePanel, row_limit
from webui.words import Words

ENGLISH = Words("en")
CURVES = ("step", 0.0, False, "")
VIEW = (*CURVES, "", str(TABLE_ROWS))  # with an empty search
ADA: Any = SimpleNamespace(name="ada")  # a request of hers


class Tab:
    """The panels, laid out and wired as on the page."""

    def __init__(self, workplace: Workplace):
        with gr.Blocks():
            context = Context(ENGLISH, workplace, "/root", gr.HTML(), lambda request: request.name, gr.Textbox())
            self.context = context
            self.table, self.head, self.buttons = (
                TablePanel(context),
                HeadPanel(context),
                ButtonsPanel(context),
            )
            self.queue, self.curves, self.output = QueuePanel(context), CurvesPanel(context), OutputPanel(context)
            self.resume = ResumePanel(context, self.buttons)
            self.panels = [self.head, self.queue, self.buttons, self.resume, self.curves, self.output]
            self.view = RunView(context, self.table, self.buttons, self.curves, self.panels)
            self.actions = RunActions(context, self.buttons, self.view)
            for panel in (self.table, self.view, *self.panels):
                panel.layout()
            self.head.layout_of_findings()
            for panel in (self.table, self.head, self.buttons, self.curves, self.actions):
                panel.wire()
            self.queue.wire_actions(self.actions)
            self.resume.wire_actions(self.actions)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(data=tmp_path / "data", saves=tmp_path / "saves")


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


@pytest.fixture
def past(place: Workplace) -> Callable[..., Run]:
    """A run as training leaves it; `outcome` None: it was interrupted."""

    def make(name: str, outcome: str | None = "finished", at: float = 1e9, stage: str = "sft") -> Run:
        return past_run(place.saves, spec_of(name, stage), falling(20), outcome, at)

    return make


def spec_of(name: str, stage: str = "sft") -> RunSpec:
    model = {"model_name_or_path": "/models/tiny"}
    return RunSpec.read({"name": name, "model": model, "stage": {"kind": stage}, "data": {"datasets": ["chat"]}})


def visible(updates: Updates, component: Any) -> bool:
    return updates[component]["visible"]


def test_every_panel_answers_only_into_what_it_has_named(tab: Tab, past: Callable[..., Run]) -> None:
    for run in (past("done"), past("broken off", outcome=None), past("killed", "stopped")):
        for panel in tab.panels:
            assert panel.now(run, CurveView(*CURVES)).keys() == set(panel.moving)
            assert panel.opened(run).keys() == set(panel.still)
        assert tab.view.open(run.id, *VIEW).keys() <= set(tab.view.outputs)
    for id in ("", "no/such/run"):
        assert tab.view.open(id, *VIEW).keys() <= set(tab.view.outputs)


def test_a_finished_run_opens_with_all_that_it_has_left(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("first")
    updates = tab.view.open(run.id, *VIEW)
    assert (visible(updates, tab.view.column), visible(updates, tab.table.column)) == (True, False)
    assert (updates[tab.view.timer].value, updates[tab.table.timer].active) == (ENDED_POLL_SECONDS, False)
    assert "<h1>first</h1>" in updates[tab.head.head]
    assert updates[tab.curves.html].count("<figure") == 2  # loss with its validation, tokens
    assert "name: first" in updates[tab.output.settings]
    assert f'href="/root/download/{run.id}/log.txt"' in updates[tab.output.log_link]
    assert "adapter/result.json" in updates[tab.output.files]
    buttons = tab.buttons
    shown = {
        name
        for name in ("stop", "kill", "resume", "clone", "delete", "chat", "export", "evaluate")
        if visible(updates, getattr(buttons, name))
    }
    assert shown == {"clone", "delete", "chat", "export", "evaluate"}
    assert [stage for _, stage in updates[buttons.follow]["choices"]][:3] == ["", "rm", "dpo"]


def test_a_run_of_several_machines_shows_and_offers_the_log_of_each(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("wide")
    for name, text in {"log": "first <one>", "log-2": "second", "log-4": "of another run"}.items():
        (run.path / f"{name}.txt").write_text(text, encoding="utf-8")
    updates = tab.view.open(run.id, *VIEW)
    log, links = updates[tab.output.log], updates[tab.output.log_link]
    assert log.count('class="log-box"') == 2
    assert log.index("Machine 1") < log.index("first &lt;one&gt;") < log.index("Machine 2") < log.index("second")
    assert re.findall(r"/(log\S*)\"", links) == ["log.txt", "log-2.txt"]
    stamp = updates[tab.view.stamp]
    (run.path / "log-2.txt").write_text("second, and on", encoding="utf-8")
    assert "second, and on" in tab.view.tick(run.id, stamp, *CURVES)[tab.output.log]


def test_a_reward_model_is_not_talked_to_and_an_interrupted_run_is_resumed(tab: Tab, past: Callable[..., Run]) -> None:
    judge = tab.view.open(past("judge", stage="rm").id, *VIEW)
    assert (visible(judge, tab.buttons.chat), visible(judge, tab.buttons.export)) == (False, True)
    broken_off = tab.view.open(past("half", outcome=None).id, *VIEW)
    assert (visible(broken_off, tab.buttons.resume), visible(broken_off, tab.buttons.export)) == (True, False)
    assert broken_off[tab.head.failure] != ""


def test_a_run_is_resumed_with_other_processes_and_only_where_there_is_a_choice(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    resume = tab.resume
    spec = spec_of("two").change("hardware", {"device": "cpu", "num_processes": 2})
    run = past_run(place.saves, spec, falling(20), None, 1e9)
    assert visible(tab.view.open(run.id, *VIEW), tab.buttons.resume_elsewhere)
    updates = resume.ask(run.id)
    assert visible(updates, resume.row)
    assert not visible(updates, resume.gpus)  # it is on the CPU
    assert not visible(updates, resume.machines)  # there are no others
    accumulated = 2 * spec.training.gradient_accumulation_steps
    assert updates[resume.processes]["choices"] == [
        count for count in range(1, accumulated + 1) if not accumulated % count
    ]
    assert updates[resume.processes]["value"] == 2
    # What a page of another program might send: nothing changes, and the message says what is wrong.
    wrong = ((1, 0.5, []), (1, "many", []), (1, -1, []), (1, 10**9, []), (1, 1, [0]), (1, 1, ["x"]), (1, 3, []))
    for choice in (*wrong, (2, 2, []), (-1, 2, []), ("two", 2, []), (10**9, 2, [])):
        assert "toast bad" in resume.resume(ADA, run.id, *choice, *VIEW)[tab.context.message], choice
    assert runs.get(place.saves, run.id).spec == spec
    updates = resume.resume(ADA, run.id, 1, 1, [], *VIEW)
    assert "toast bad" not in updates[tab.context.message]
    changed = runs.get(place.saves, run.id)
    assert (changed.state, changed.spec.hardware.num_processes) == ("queued", 1)
    assert changed.spec.training.gradient_accumulation_steps == accumulated
    whole = past_run(
        place.saves, spec_of("whole").change("training.gradient_accumulation_steps", 1), falling(9), None, 2e9
    )
    assert not visible(tab.view.open(whole.id, *VIEW), tab.buttons.resume_elsewhere)


def test_a_run_is_resumed_on_more_machines_of_a_cluster(
    tab: Tab, place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_commands(tmp_path, monkeypatch)
    hardware = {"device": "cpu", "num_processes": 2}
    spec = spec_of("two").change("hardware", hardware).change("training.gradient_accumulation_steps", 2)
    run = past_run(place.saves, spec, falling(20), None, 1e9)
    (place.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    resume = tab.resume
    updates = resume.ask(run.id)
    assert (updates[resume.machines]["choices"], updates[resume.machines]["value"]) == ([1, 2, 4], 1)
    assert updates[resume.processes]["choices"] == [1, 2, 4]
    assert resume.for_machines(run.id, 2, 1) == {resume.processes: gr.update(choices=[2, 4], value=2)}
    assert resume.for_machines(run.id, 4, 4) == {resume.processes: gr.update(choices=[4], value=4)}
    for nothing in (3, -1, "many", None, 10**9):  # what a page of another program might send
        resume.for_machines(run.id, nothing, 2)
    assert "toast bad" in resume.resume(ADA, run.id, 4, 2, [], *VIEW)[tab.context.message]
    assert "toast bad" not in resume.resume(ADA, run.id, 2, 4, [], *VIEW)[tab.context.message]
    chosen = runs.get(place.saves, run.id).spec.hardware
    assert (chosen.num_machines, chosen.num_processes) == (2, 4)


def test_a_run_that_is_not_there_leads_to_the_table_and_says_so(tab: Tab, past: Callable[..., Run]) -> None:
    past("other")
    updates = tab.view.open("no/such/run", *VIEW)
    assert updates[tab.context.selected] == ""
    assert "toast bad" in updates[tab.context.message]
    assert visible(updates, tab.table.column) is True
    assert "other" in updates[tab.table.table]


def test_a_look_at_a_run_answers_only_what_has_changed(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("going", outcome=None)
    stamp = tab.view.open(run.id, *VIEW)[tab.view.stamp]
    assert tab.view.tick(run.id, stamp, *CURVES) == gr.skip()
    with run.dir.metrics.open("a") as file:
        file.write(json.dumps({"step": 21, "epoch": 1.05, "time": 10.5, "loss": 0.125}) + "\n")
    updates = tab.view.tick(run.id, stamp, *CURVES)
    assert updates.keys() <= set(tab.view.moving)
    assert "active" not in updates[tab.view.timer]  # if the tab was left meanwhile, its timer rests
    assert updates[tab.view.stamp] != stamp
    assert "0.125" in updates[tab.curves.html]


def test_the_page_catches_up_with_the_open_run_and_opens_another_in_full(tab: Tab, past: Callable[..., Run]) -> None:
    opened_run, other_run = past("one"), past("one two")
    opened = tab.view.catch_up(opened_run.id, "", *VIEW)
    assert visible(opened, tab.view.column)
    stamp = opened[tab.view.stamp]
    assert tab.view.catch_up(opened_run.id, stamp, *VIEW) == gr.skip()
    other = tab.view.catch_up(other_run.id, stamp, *VIEW)
    assert visible(other, tab.view.column)
    assert "<h1>one two</h1>" in other[tab.head.head]
    assert visible(tab.view.catch_up(opened_run.id, other[tab.view.stamp], *VIEW), tab.view.column)
    closed = tab.view.catch_up("", stamp, *VIEW)
    assert (visible(closed, tab.view.column), closed[tab.view.stamp]) == (False, "")  # to be opened in full again


def test_a_run_that_was_deleted_elsewhere_says_so_and_offers_nothing(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("first")
    opened = tab.view.open(run.id, *VIEW)
    assert visible(opened, tab.buttons.compare)
    runs.delete(run)
    updates = tab.view.tick(run.id, opened[tab.view.stamp], *CURVES)
    assert updates.keys() <= {*tab.view.moving, *tab.view.still}
    assert updates[tab.view.timer].active is False
    assert ENGLISH("run-deleted") in updates[tab.head.head]
    assert "first" in updates[tab.head.head]
    assert not any(visible(updates, button) for button in [*tab.buttons.moving, *tab.buttons.still])
    assert "href" not in updates[tab.output.files] + updates[tab.output.log_link]


def test_a_resumed_run_says_from_where_and_how_long_it_took_in_all(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("going on")
    write_json(run.dir.request, run.request | {"attempt": 3, "resumed_from": 40})
    for number, file in ((1, "exit"), (2, "progress")):  # the second was interrupted
        attempt = RunDir(run.dir.attempts / str(number))
        attempt.path.mkdir(parents=True)
        write_json(attempt.keeper, {"started": 1e9})
        write_json(getattr(attempt, file), {"ended": 1e9 + 120} if file == "exit" else {"at": 1e9 + 30.0})
    head = tab.view.open(run.id, *VIEW)[tab.head.head]
    assert "took 3 min 30 s in all, 1 min 0 s since it was resumed" in head
    assert "continued from step 40" in head
    write_json(run.dir.request, run.request | {"attempt": 3, "resumed_from": 0})
    assert ENGLISH("continued-from-start") in tab.view.open(run.id, *VIEW)[tab.head.head]


def test_pages_that_look_at_one_run_share_what_has_changed(
    tab: Tab, past: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bool] = []
    draw = charts.charts
    monkeypatch.setattr(charts, "charts", lambda *words: drawn.append(words[4]) or draw(*words))
    tab.view.shared.seconds = 600.0  # however slow this machine is
    run = past("going", outcome=None)
    logarithmic = (*CURVES[:2], True, *CURVES[3:])
    first, second, other = (tab.view.tick(run.id, "", *view) for view in (CURVES, CURVES, logarithmic))
    assert first.keys() == second.keys()
    assert first[tab.curves.html] == second[tab.curves.html]
    assert first[tab.curves.html] != other[tab.curves.html]
    assert drawn == [False, True]


def test_curves_are_drawn_anew_as_they_are_looked_at(tab: Tab, past: Callable[..., Run]) -> None:
    run = past("curved")
    by_step, by_time = (tab.curves.redraw(run.id, x, 0.0, False)[tab.curves.html] for x in ("step", "time"))
    assert "Step 20" in by_step
    assert "Step 20" not in by_time
    assert tab.curves.redraw("no/such/run", *CURVES) == gr.skip()


def test_the_table_is_searched_and_grows_by_the_button(
    tab: Tab, past: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webui.runs_tab.table_panel.TABLE_ROWS", 2)
    for at, name in enumerate(("alpha", "beta", "gamma")):
        past(name, at=1e9 + at)
    first = tab.table.list_runs(None, "2")
    assert ["gamma" in first[tab.table.table], "alpha" in first[tab.table.table]] == [True, False]
    assert first[tab.table.more] == gr.update(visible=True, value=ENGLISH("runs-more", count=1))
    more = tab.table.list_more("", "2")
    assert more[tab.table.limit] == "4"
    assert "alpha" in more[tab.table.table]
    assert visible(more, tab.table.more) is False
    searched = tab.table.list_runs("  BETA tiny ", "2")[tab.table.table]
    assert ("beta" in searched, "gamma" in searched) == (True, False)
    assert "&lt;nothing&gt;" in tab.table.list_runs("<nothing>", "2")[tab.table.table]
    assert tab.table.refresh(first[tab.table.stamp], "", "2") == gr.skip()
    past("delta", at=2e9)
    assert "delta" in tab.table.refresh(first[tab.table.stamp], "", "2")[tab.table.table]


def test_rows_are_as_many_as_the_page_says() -> None:
    assert [row_limit(text) for text in ("250", "", "-1", "x", "9" * 8, "9" * 9)] == [
        250,
        100,
        100,
        100,
        100_000,
        100,
    ]


def test_what_an_action_did_is_said_and_what_it_was_refused_for(tab: Tab, past: Callable[..., Run]) -> None:
    run, message = past("done"), tab.context.message
    for refused in (tab.actions.stop, tab.actions.kill):
        updates = refused(ADA, run.id, *VIEW)
        assert "toast bad" in updates[message]
        assert "<h1>done</h1>" in updates[tab.head.head]
    gone = tab.actions.resume(ADA, "no/such/run", *VIEW)
    assert ("toast bad" in gone[message], gone[tab.context.selected]) == (True, "")


def test_a_run_that_waits_because_the_disk_is_full_says_so(
    tab: Tab, past: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = past("waiting", outcome=None)
    run.dir.keeper.unlink()
    assert tab.view.open(run.id, *VIEW)[tab.head.cautions] == ""
    monkeypatch.setattr(hardware, "free_disk", lambda path: 4096)
    assert ENGLISH("space-to-start") in tab.view.open(run.id, *VIEW)[tab.head.cautions]


def test_a_waiting_run_is_killed_by_whoever_asks_and_then_deleted(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: None)  # there is no process to be ended
    run = past_run(place.saves, spec_of("waiting"), outcome=None)
    run.dir.keeper.unlink()
    write_json(run.dir.request, {"by": "bob", "submitted": 1.0, "queued": 1, "attempt": 1, "stop": None})
    assert runs.get(place.saves, run.id).state == "queued"
    updates = tab.actions.kill(ADA, run.id, *VIEW)
    assert "toast good" in updates[tab.context.message]
    killed = runs.get(place.saves, run.id)
    assert (killed.final, killed.request["stop"]["how"], killed.request["stop"]["by"]) == (
        True,
        "kill",
        "ada",
    )
    assert visible(updates, tab.buttons.sure_kill) is False
    deleted = tab.actions.delete(run.id, *VIEW)
    assert ("toast good" in deleted[tab.context.message], deleted[tab.context.selected]) == (True, "")
    assert visible(deleted, tab.table.column) is True
    assert not run.path.exists()


def test_a_waiting_run_shows_why_and_its_turn_can_be_changed(
    tab: Tab, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    first, second = (runs.submit(make_spec(name=name), workplace) for name in ("first", "second"))
    panel = tab.queue

    def shown(run: Run) -> Updates:
        return tab.view.open(run.id, *VIEW)

    opened = shown(second)
    assert opened[panel.column]["visible"]
    assert "position 2 in the queue" in opened[tab.head.head]
    assert opened[panel.reason] == "<p>Waits for the CPU. Before it: first.</p>"
    assert (opened[panel.buttons["hold"]]["visible"], opened[panel.buttons["release"]]["visible"]) == (True, False)
    assert opened[panel.priority]["value"] == "normal"

    done = tab.actions.act("reorder", partial(queue_order.move, where="first"), "told-queue-first", second.id, VIEW)
    assert "Moved to the front" in done[tab.context.message]
    assert "position 1 in the queue" in done[tab.head.head]
    done = tab.actions.act("reorder", queue_order.hold, "told-queue-hold", second.id, VIEW)
    assert done[panel.reason] == "<p>On hold. It stays in the queue until somebody releases it.</p>"
    assert (done[panel.buttons["hold"]]["visible"], done[panel.buttons["release"]]["visible"]) == (False, True)
    write_json(second.dir.slurm, {"job": "7", "user": "0"})
    monkeypatch.setattr(queue_html, "reason", lambda *_: "")
    there = panel.now(replace(second, state="queued"), VIEW)
    buttons = {name for name, button in panel.buttons.items() if there[button]["visible"]}
    assert buttons == {"hold", "first"}  # what Slurm does for a run that it has
    runs.stop(first, "kill")
    refused = tab.actions.act("reorder", queue_order.hold, "told-queue-hold", first.id, VIEW)
    assert "Only a run that is queued has a turn" in refused[tab.context.message]
    assert not refused[panel.column]["visible"]


def test_trainings_of_another_program_are_offered_only_from_named_folders_and_to_who_may(place: Workplace) -> None:
    place.saves.mkdir()
    root = place.saves.parent / "LLaMA-Factory" / "saves"
    good, bad = root / "Base" / "lora" / "train_1", root / "Base" / "lora" / "<b>failed"
    for folder in (good, bad):
        folder.mkdir(parents=True)
        write_json(folder / "adapter_config.json", {"base_model_name_or_path": "org/Base", "r": 4, "lora_alpha": 8})
    save_file({"base_model.model.x.lora_A.weight": np.zeros((4, 8))}, good / "adapter_model.safetensors")

    def imports(*roots: Path) -> ImportPanel:
        with gr.Blocks():
            workplace = replace(place, import_from=roots)
            context = Context(ENGLISH, workplace, "", gr.HTML(), lambda request: request.name, gr.Textbox())
            panel = ImportPanel(context)
            panel.layout()
            panel.wire()
        return panel

    assert not hasattr(imports(), "fold")
    panel = imports(root, root / "gone")
    offered = panel.look()
    assert offered[panel.chosen]["choices"] == [("saves/Base/lora/train_1 · Base · just now", str(good))]
    assert "&lt;b&gt;failed" in offered[panel.report]
    assert "gone is not a folder" in offered[panel.report]

    def bring(name: str, role: str, *folders: Any) -> str:
        request = SimpleNamespace(state=SimpleNamespace(user=name, role=role), client=None)
        note_person(request)
        return [*panel.bring(list(folders))][-1][panel.report]

    request_context = copy_context()
    assert "as a viewer" in request_context.run(bring, "vic", "viewer", str(good))
    for folder in ("", "/etc", str(root.parent), str(root / ".." / ".."), "\0", "x" * 5000):
        assert 'class="problems"' in request_context.run(bring, "ada", "user", folder), folder
    assert "is not in a folder from which runs may be imported" in request_context.run(bring, "ada", "user", "/etc")
    assert runs.find(place.saves) == []
    assert "1 run imported" in request_context.run(bring, "ada", "user", str(good))
    (run,) = runs.find(place.saves)
    assert (run.by, run.state, run.title) == ("ada", "finished", "train_1")
    assert panel.look()[panel.chosen]["choices"] == []
    assert [*panel.bring(None)][-1][panel.go]["visible"] is False
    assert f"LLaMA-Factory, {good}" in head_html.head(run, run.path.parents[2], ENGLISH)
    assert "settings were put together" in head_html.findings(run, ENGLISH)
