"""Coming to the page, and from one tab into another, without a browser: what is answered into which component."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from engine.core import dismissals
from engine.core.rights import Person
from engine.core.rundir import read_object, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs.results import new_export_spec
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run
from webui.panels import Updates
from webui.studio.first_steps import known_of, routes
from webui.studio.header import header
from webui.studio.navigation import Navigation
from webui.studio.tabs import Frame, Tabs, lay_out_frame, lay_out_tabs
from webui.studio.transfers import FromLoaded, FromRun, IntoForm
from webui.words import Words

# A request of hers, as the login leaves it.
ADA: Any = SimpleNamespace(state=SimpleNamespace(user="ada", role="user", account_pages=["logout"]))


class Page:
    """The page, and what leads through it."""

    def __init__(self, workplace: Workplace):
        with gr.Blocks():
            self.frame: Frame = lay_out_frame(Words("en"), workplace, "/root")
            self.tabs: Tabs = lay_out_tabs(self.frame)
            self.navigation = Navigation(self.frame, self.tabs)
            self.into_form, self.from_run = IntoForm(self.frame, self.tabs), FromRun(self.frame, self.tabs)
            self.from_loaded = FromLoaded(self.frame, self.tabs)

    def shows(self, updates: Updates) -> str | None:
        """The tab that comes to the front."""
        return updates[self.tabs.tabs].selected if self.tabs.tabs in updates else None

    def form(self, updates: Updates) -> RunSpec:
        """What the form of the Train tab holds after it was filled."""
        return self.tabs.train.read([updates[control] for control in self.tabs.train.inputs])

    def held(self) -> list[Any]:
        """What that form holds when the page was built."""
        return [control.value for control in self.tabs.train.inputs]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(25)]
    (data / "numbers.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"numbers": {"file_name": "numbers.json"}}))
    return Workplace(models=(DEMO_MODEL,), data=data, saves=tmp_path / "saves")


@pytest.fixture
def page(place: Workplace) -> Page:
    return Page(place)


@pytest.fixture
def trained(place: Workplace) -> Callable[..., Run]:
    """A finished run of the demo model."""

    def make(name: str, **changes: Any) -> Run:
        spec = {
            "name": name,
            "model": {"model_name_or_path": str(DEMO_MODEL)},
            "data": {"datasets": ["numbers"]},
        }
        return past_run(place.saves, RunSpec.read(spec | changes))

    return make


@pytest.mark.parametrize(
    ("run", "tab", "shown"),
    [
        ("a/b/c", "data", "runs"),
        ("", "compare", "compare"),
        ("", "train", None),
        ("", "", None),
        ("", "x<y", None),
    ],
)
def test_the_page_comes_as_its_address_says(page: Page, run: str, tab: str, shown: str | None) -> None:
    updates = page.navigation.arrive(ADA, run, tab, "set:numbers", "", "e/f/g", "")
    assert page.shows(updates) == shown
    assert updates[page.frame.selected] == run
    assert updates[page.tabs.data.chosen] == "set:numbers"
    assert updates[page.tabs.evaluate.opened] == "e/f/g"
    assert 'class="who">ada<' in updates[page.frame.head]
    assert 'action="/root/logout"' in updates[page.frame.head]


def test_the_first_steps_are_offered_to_whoever_has_no_runs_yet(place: Workplace) -> None:
    alone, ada, eve = Person(role="operator"), Person("ada", "user"), Person("eve", "viewer")
    assert [known_of(place, person) for person in (alone, ada, eve)] == ["first", "first", ""]
    spec = RunSpec.read(
        {"name": "theirs", "model": {"model_name_or_path": "org/base"}, "data": {"datasets": ["names"]}}
    )
    run = past_run(place.saves, spec)
    write_json(run.dir.request, read_object(run.dir.request) | {"by": "who works in a shell"})
    assert [known_of(place, person) for person in (alone, ada)] == ["", "first"]
    assert "data-first" in header(Words("en"), ada, "", known_steps="first")
    assert "data-first" not in header(Words("en"), ada, "")


def test_who_is_done_with_the_first_steps_is_so_in_every_browser(place: Workplace) -> None:
    async def as_user(scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope["headers"]).get(b"who", b"").decode()
        await Starlette(routes=routes(place.saves))({**scope, "state": {"user": name}}, receive, send)

    ada, bob, alone = Person("ada", "user"), Person("bob", "user"), Person(role="operator")
    place.saves.mkdir(exist_ok=True)
    client = TestClient(as_user)

    def say(name: str, **fields: str) -> list[str]:
        answer = client.post("/first-steps", data=fields, headers={"who": name})
        assert answer.status_code == 204
        return [known_of(place, person) for person in (ada, bob, alone)]

    assert say("ada", over="1") == ["over", "first", "first"]
    for name in ("", "../bob", "x" * 300):  # nobody, or no name of a user
        assert say(name, over="1") == ["over", "first", "first"]
    assert say("ada", over="0") == say("ada") == say("ada", over="<script>") == ["first", "first", "first"]
    assert "data-over" in header(Words("en"), ada, "", known_steps="over")
    shutil.rmtree(place.saves / dismissals.FOLDER)
    (place.saves / dismissals.FOLDER).write_text("in the way")  # as a disk that takes nothing: it is offered again
    assert say("bob", over="1") == ["first", "first", "first"]


def test_a_run_is_cloned_into_the_form(page: Page, trained: Callable[..., Run]) -> None:
    run = trained("first", training={"learning_rate": 0.125})
    updates = page.into_form.clone(run.id)
    assert page.shows(updates) == "train"
    assert page.form(updates) == run.spec
    assert "first" in updates[page.frame.message]


def test_a_stage_follows_on_a_run(page: Page, trained: Callable[..., Run]) -> None:
    run = trained("first")
    updates = page.into_form.follow(run.id, "dpo")
    spec = page.form(updates)
    assert (page.shows(updates), spec.stage.kind) == ("train", "dpo")
    assert spec.model.adapter_path == str(run.dir.adapter)
    assert page.into_form.follow(run.id, "") == gr.skip()


def test_a_data_set_goes_into_the_form(page: Page) -> None:
    updates = page.into_form.use_set("set:numbers", *page.held())
    assert page.shows(updates) == "train"
    assert page.form(updates).data.datasets == {"numbers": 1.0}


def test_an_export_goes_into_the_form_and_other_clicks_are_not_meant(page: Page, trained: Callable[..., Run]) -> None:
    run = trained("first")
    updates = page.into_form.use_export(clicked(run=run.id), *page.held())
    assert page.shows(updates) == "train"
    assert page.form(updates).model.adapter_path == str(run.dir.adapter)
    assert page.into_form.use_export(clicked(retry=run.id), *page.held()) == gr.skip()


def clicked(**data: str) -> Any:
    return SimpleNamespace(_data=data)


def test_what_cannot_be_done_is_said_and_nothing_else_changes(page: Page) -> None:
    for updates in (
        page.into_form.clone("no/such/run"),
        page.into_form.follow("no/such/run", "dpo"),
        page.into_form.use_set("set:gone", *page.held()),
        page.into_form.use_export(clicked(run="no/such/run"), *page.held()),
        page.from_run.compare("no/such/run"),
        page.from_run.evaluate("no/such/run", "", None, []),
        page.from_run.chat(ADA, "no/such/run", {}, {}, None, [], "transformers"),
    ):
        assert updates.keys() == {page.frame.message}
        assert "toast bad" in updates[page.frame.message]


def test_the_open_run_is_compared_with_those_like_it(page: Page, trained: Callable[..., Run]) -> None:
    first, second = trained("first"), trained("second")
    updates = page.from_run.compare(first.id)
    assert page.shows(updates) == "compare"
    assert updates.keys() <= {page.tabs.tabs, *page.tabs.compare.chosen}
    assert set(updates[page.tabs.compare.chosen[0]]["value"]) == {first.id, second.id}


def test_the_open_run_is_chosen_to_be_exported(page: Page, trained: Callable[..., Run]) -> None:
    run = trained("first")
    held = [control.value for control in page.tabs.export.inputs]
    updates = page.from_run.export(run.id, *held)
    assert page.shows(updates) == "export"
    assert updates[page.tabs.export.inputs[0]]["value"] == [run.id]


def test_what_was_loaded_in_the_form_goes_on_to_its_own_tab(
    page: Page, place: Workplace, trained: Callable[..., Run]
) -> None:
    run = trained("first")
    export = page.from_loaded.open(new_export_spec(place, {run.id: 1.0}).to_yaml())
    assert page.shows(export) == "export"
    assert export[page.tabs.export.inputs[0]]["value"] == [run.id]
    spec = EvaluationSpec.read({"name": "measured", "model": {"model_name_or_path": str(DEMO_MODEL)}})
    evaluation = page.from_loaded.open(spec.to_yaml())
    assert page.shows(evaluation) == "evaluate"
    assert "measured" in evaluation.values()
    assert page.from_loaded.open("") == gr.skip()


def test_timers_of_tabs_that_are_not_looked_at_rest(place: Workplace) -> None:
    with gr.Blocks() as blocks:
        page = Page(place)
        page.navigation.wire(blocks)
    timers = {id: {getattr(page.tabs, id).timer} for id in ("chat", "compare", "export", "evaluate")}
    timers["runs"] = set(page.tabs.runs.timers)
    timers |= {id: {panel.timer} for id, panel in page.tabs.gpus.items()}
    for id, item in page.tabs.items.items():
        [pause] = [
            event
            for event in blocks.fns.values()
            if (item._id, "select") in event.targets and set(event.outputs) <= set().union(*timers.values())
        ]
        assert set(pause.outputs) == set().union(*(own for other, own in timers.items() if other != id))
        all_rest = f"() => Array({len(pause.outputs)}).fill({{ __type__: 'update', active: false }})"
        assert (pause.fn, pause.js) == (None, all_rest)
