"""The handlers of the Export tab, called without a browser: what they answer into which component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, write_json, write_text
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import runs
from engine.runs.results import new_export_spec
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run
from webui.export_tab.export_list import ExportList
from webui.export_tab.export_specs import with_export
from webui.export_tab.form_panel import FormPanel
from webui.export_tab.panel import Context
from webui.export_tab.upload_panel import UploadPanel
from webui.panels import Updates
from webui.words import Words

ENGLISH = Words("en")
ADA: Any = SimpleNamespace(name="ada")  # a request of hers


class Tab:
    """The panels, laid out and wired as on the page."""

    def __init__(self, workplace: Workplace):
        with gr.Blocks():
            context = Context(ENGLISH, workplace, "/root", gr.HTML(), lambda request: request.name)
            self.message = context.message
            self.uploads = UploadPanel(context)
            self.exports = ExportList(context, self.uploads)
            self.form = FormPanel(context, self.exports)
            for panel in (self.form, self.exports, self.uploads):
                panel.layout()
            for panel in (self.form, self.exports, self.uploads):
                panel.wire()

    def held(self, *ids: str, **typed: Any) -> list[Any]:
        """What the controls hold with these runs chosen; `typed` is what else somebody has typed."""
        values = {name: control.value for name, control in self.form.controls.items()}
        return list((values | {"runs": list(ids)} | typed).values())


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(models=(DEMO_MODEL,), data=tmp_path / "data", saves=tmp_path / "saves")


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


@pytest.fixture
def trained(place: Workplace) -> Callable[..., Run]:
    """A run of the demo model that has left an adapter, or a whole model."""

    def make(name: str, method: str = "lora") -> Run:
        model = {"model_name_or_path": str(DEMO_MODEL)}
        return past_run(place.saves, RunSpec.read({"name": name, "model": model, "method": method}))

    return make


def exported(place: Workplace, name: str, outcome: str = "finished", at: float = 2e9) -> Run:
    """A merged model as an export leaves it, without weights."""
    run = RunDir(place.saves / "demo_model" / "export" / name)
    run.model.mkdir(parents=True)
    spec = ExportSpec.read({"name": name, "model": {"model_name_or_path": str(DEMO_MODEL)}})
    write_text(run.spec, spec.to_yaml())
    if outcome == "finished":
        write_json(run.model / "result.json", {"attempt": 1, "complete": True, "stage": "sft"})
    reason = {"failed": "exit"}.get(outcome, outcome)
    write_json(run.exit, {"outcome": outcome, "reason": reason, "code": 1, "ended": at})
    write_json(run.request, {"kind": "export", "by": "", "submitted": at, "queued": 1, "attempt": 1, "stop": None})
    return runs.read(run.path, place.saves)


def visible(updates: Updates, component: Any) -> bool:
    return updates[component]["visible"]


def test_one_arrives_at_the_results_and_the_exports_that_there_are(
    tab: Tab, place: Workplace, trained: Callable[..., Run]
) -> None:
    first, whole = trained("first"), trained("whole", "full")
    exported(place, "merged")
    updates = tab.form.arrive([first.id, "no/such/run"], *tab.held()[1:])
    assert updates.keys() == set(tab.form.outputs)
    chosen = updates[tab.form.controls["runs"]]
    assert chosen["value"] == [first.id]
    assert {id: label.split(" · ")[2] for label, id in chosen["choices"]} == {
        first.id: ENGLISH("export-kind-adapter"),
        whole.id: ENGLISH("export-kind-model"),
        "demo_model/export/merged": ENGLISH("export-kind-model"),
    }
    assert '<details class="export" data-export="demo_model/export/merged" open>' in updates[tab.exports.html]
    assert updates[tab.exports.timer].active is False
    assert [id for _, id in updates[tab.uploads.which]["choices"]] == ["demo_model/export/merged"]


def test_settings_of_a_combination_are_shown_where_there_is_one(tab: Tab, trained: Callable[..., Run]) -> None:
    first, second = trained("one"), trained("two")
    for ids, combined in (((), False), ((first.id,), False), ((first.id, second.id), True)):
        updates = tab.form.look(*tab.held(*ids))
        assert updates.keys() == set(tab.form.changing)
        for name in ("weights", "combination", "density", "svd_rank"):
            assert visible(updates, tab.form.controls[name]) is combined
    assert ENGLISH("export-choose") in tab.form.look(*tab.held())[tab.form.plan]


def test_what_is_wrong_is_told_by_the_labels_of_this_page(tab: Tab, trained: Callable[..., Run]) -> None:
    first, second = trained("one"), trained("two")
    plan = tab.form.look(*tab.held(first.id, second.id, weights="1, two"))[tab.form.plan]
    assert ENGLISH("export-weights") in plan
    plan = tab.form.look(*tab.held(first.id, shard_gb="much"))[tab.form.plan]
    assert ENGLISH.of_export("shard_gb", "label") in plan
    assert ENGLISH("to-fix", count=1) in plan


def test_the_form_becomes_the_spec_that_is_submitted(
    tab: Tab, place: Workplace, trained: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = trained("one"), trained("two")
    submitted = []
    monkeypatch.setattr(
        "webui.export_tab.form_panel.runs.submit", lambda spec, _place, by: submitted.append((spec, by))
    )
    held = tab.held(first.id, second.id, weights="0.25", prompts="How?\n\nWhy?", license=" mit ", svd_rank="4")
    updates = tab.form.start(ADA, *held)
    assert "toast good" in updates[tab.message]
    [(spec, by)] = submitted
    assert by == "ada"
    assert spec.adapters == {str(first.dir.adapter): 0.25, str(second.dir.adapter): 1.0}
    assert (spec.prompts, spec.license, spec.svd_rank, spec.form) == (["How?", "Why?"], "mit", 4, "merged")


def test_an_export_that_is_refused_is_said_in_the_corner_and_listed_on_the_card(tab: Tab, place: Workplace) -> None:
    updates = tab.form.start(ADA, *tab.held("no/such/run"))
    assert "toast bad" in updates[tab.message]
    assert "no/such/run" in updates[tab.form.plan]
    assert runs.find(place.saves) == []


def test_a_spec_fills_the_form_if_its_adapters_are_results_of_runs_here(
    tab: Tab, place: Workplace, trained: Callable[..., Run]
) -> None:
    run = trained("one")
    spec = new_export_spec(place, {run.id: 1.0}, form="adapter", shard_gb=2.5, name="mine")
    updates = tab.form.fill(spec)
    assert updates is not None
    assert updates.keys() == set(tab.form.filled)
    values = {name: updates.get(control) for name, control in tab.form.controls.items()}
    assert values["runs"]["value"] == [run.id]
    assert (values["form"], values["shard_gb"], values["name"]) == ("adapter", "2.5", "mine")
    runs.delete(run)
    assert tab.form.fill(spec) is None


def test_a_look_at_the_list_answers_only_what_has_changed(tab: Tab, place: Workplace) -> None:
    exported(place, "first")
    stamp = tab.exports.listed()[tab.exports.stamp]
    assert tab.exports.tick(stamp) == gr.skip()
    exported(place, "second", "failed", at=2.1e9)
    updates = tab.exports.tick(stamp)
    assert updates.keys() == set(tab.exports.outputs)
    assert updates[tab.exports.html].count('<details class="export"') == 2
    assert [id for _, id in updates[tab.uploads.which]["choices"]] == ["demo_model/export/first"]


def test_the_last_step_of_an_export_is_tried_again_and_other_clicks_are_not_meant(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, resumed = exported(place, "first", "failed"), []
    monkeypatch.setattr("webui.export_tab.export_list.runs.resume", lambda run, by, data: resumed.append((run.id, by)))
    assert tab.exports.retry(ADA, clicked(run=run.id)) == gr.skip()
    assert resumed == []
    updates = tab.exports.retry(ADA, clicked(retry=run.id))
    assert resumed == [(run.id, "ada")]
    assert updates.keys() == {tab.message, *tab.exports.outputs}
    gone = tab.exports.retry(ADA, clicked(retry="no/such/run"))
    assert "toast bad" in gone[tab.message]


def clicked(**data: str) -> Any:
    return SimpleNamespace(_data=data)


def test_an_upload_empties_the_token_at_once_and_says_where_it_is(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sent = exported(place, "first"), []

    def publish(run: Run, repo: str, token: str, private: bool, by: str) -> dict[str, str]:
        sent.append((run.id, repo, token, private, by))
        return {"url": "https://hub.example/a&b"}

    monkeypatch.setattr("webui.export_tab.upload_panel.publish.publish", publish)
    uploads = tab.uploads
    answers = uploads.send(ADA, run.id, "a/b", "hf_secret", True)
    begun = next(answers)
    assert sent == []
    assert (begun[uploads.token], begun[uploads.button]["interactive"]) == ("", False)
    done = next(answers)
    assert sent == [(run.id, "a/b", "hf_secret", True, "ada")]
    assert "https://hub.example/a&amp;b" in done[uploads.status]
    assert (done[uploads.token], done[uploads.button]["interactive"]) == ("", True)


def test_an_upload_that_is_refused_says_why(tab: Tab) -> None:
    *_, done = tab.uploads.send(ADA, None, None, None, True)
    assert 'class="problems"' in done[tab.uploads.status]
    assert done[tab.uploads.button]["interactive"] is True


def test_an_export_takes_the_model_s_place_in_the_form(place: Workplace, trained: Callable[..., Run]) -> None:
    form = RunSpec.read({"model": {"quantization": "4bit", "chat_template": "chatml"}, "name": "kept"})
    whole = with_export(exported(place, "merged"), form)
    assert whole.model.model_name_or_path == str(place.saves / "demo_model/export/merged/model")
    assert (whole.model.adapter_path, whole.model.quantization.kind, whole.name) == (None, "none", "kept")
    adapter = trained("one")
    used = with_export(adapter, form)
    assert (used.model.model_name_or_path, used.model.adapter_path) == (
        str(DEMO_MODEL),
        str(adapter.dir.adapter),
    )
    with pytest.raises(Refusal) as refusal:
        with_export(exported(place, "broken", "failed"), form)
    assert refusal.value.problems == [problem("export-no-result", id="demo_model/export/broken")]
