"""The handlers of the Train tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from engine.core.problems import problem
from engine.core.rundir import write_json
from engine.data import data_jobs
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.models import conversion
from engine.runs import compare, runs
from engine.runs.plan import start_from
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run
from webui.form import kept
from webui.form.settings import ADAPTER, DATASETS, MODEL, SAVED_MODULES, TARGET_MODULES
from webui.panels import Updates
from webui.train_tab import conversion_panel, model_html, sweep_panel
from webui.train_tab.choices import trainable_models
from webui.train_tab.load_panel import MAX_YAML_CHARACTERS, LoadPanel
from webui.train_tab.own_presets_panel import OwnPresetsPanel
from webui.train_tab.panel import Context
from webui.train_tab.preset_panel import PresetPanel
from webui.train_tab.settings_panel import SettingsPanel
from webui.train_tab.summary_panel import SummaryPanel
from webui.train_tab.sweep_panel import SweepPanel
from webui.words import Words

ENGLISH = Words("en")
ADA: Any = SimpleNamespace(name="ada")  # a request of hers


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """The demo model, a data set of conversations and one of texts."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(25)]
    (data / "numbers.json").write_text(json.dumps(rows))
    (data / "texts.json").write_text(json.dumps([{"text": "After one comes two. " * 9}] * 25))
    entries = {
        "numbers": {"file_name": "numbers.json"},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
    }
    (data / "dataset_info.json").write_text(json.dumps(entries))
    return Workplace(models=(DEMO_MODEL,), data=data, saves=tmp_path / "saves")


class Tab:
    """The panels, laid out and wired as on the page."""

    def __init__(self, workplace: Workplace):
        with gr.Blocks():
            context = Context(ENGLISH, workplace, gr.HTML(), lambda request: request.name, gr.Textbox())
            self.context = context
            self.built_with = start_from(workplace, "demo")[0]
            self.settings = SettingsPanel(context, "demo")
            self.summary, self.own = SummaryPanel(context, self.settings), OwnPresetsPanel(context, self.settings)
            self.presets = PresetPanel(context, self.settings, self.summary, self.own)
            self.load, self.sweep = LoadPanel(context, self.summary), SweepPanel(context, self.settings)
            for panel in (self.settings, self.summary, self.sweep, self.load):
                panel.layout()
            self.settings.layout_of_preset()
            self.own.layout()
            self.settings.layout_of_name()
            self.summary.layout_of_marks()
            for panel in (self.settings, self.summary, self.sweep, self.own, self.presets, self.load):
                panel.wire()

    def control(self, path: str) -> Any:
        return self.settings.form.controls[path]

    def held(self, spec: RunSpec, **typed: Any) -> list[Any]:
        """What the controls hold for a spec; `typed` is what else somebody has typed, by path with `__` for the dot."""
        values = self.settings.form.updates(spec)
        values |= {self.control(path.replace("__", ".")): value for path, value in typed.items()}
        return [values[control] for control in self.settings.inputs]

    def shown(self, updates: Updates) -> RunSpec:
        """The spec that the form holds once it has been filled."""
        spec, problems = self.settings.read([updates[control] for control in self.settings.inputs])
        assert problems == []
        return spec


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


def test_a_model_that_has_to_be_converted_is_offered_for_it_and_the_result_is_chosen(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "packed"
    folder.mkdir(parents=True)
    (folder / "packed.Q4_K.gguf").touch()
    place = replace(place, models=(*place.models, folder.parent))
    tab = Tab(place)
    button = tab.settings.conversion.button
    spec = tab.built_with
    assert tab.summary.of_spec(spec)[button]["visible"] is False
    updates = tab.summary.of_spec(spec.change("model.model_name_or_path", str(folder)))
    assert (updates[button]["visible"], updates[button]["value"]) == (True, ENGLISH("convert-gguf"))
    assert "packed.Q4_K.gguf" in updates[tab.settings.model_facts]

    quantized = spec.change("model.model_name_or_path", str(folder))
    monkeypatch.setattr(conversion_panel, "offered", lambda *_: conversion.Convertible(folder / "config.json", folder))
    assert tab.summary.of_spec(quantized)[button]["visible"] is False  # as it is, it can be trained
    offered = tab.summary.of_spec(quantized.change("model.quantization", "4bit"))[button]
    assert (offered["visible"], offered["value"]) == (True, ENGLISH("convert-quantized"))
    monkeypatch.undo()

    job = data_jobs.DataJob(place.saves / data_jobs.JOBS_FOLDER / "convert-1")
    job.path.mkdir(parents=True)
    started: list[Any] = []
    monkeypatch.setattr(data_jobs, "start", lambda *asked: started.append(asked) or job)
    panel = tab.settings.conversion
    answer = panel.start(str(folder))
    assert (answer[panel.job_id], answer[panel.source]) == ("convert-1", str(folder))
    target = str(folder.parent / "packed-safetensors")
    paths = {"file": str(folder / "packed.Q4_K.gguf"), "target": target}
    assert started == [(place.saves, "convert", paths)]
    write_json(job.path / "request.json", {"given": paths})
    write_json(job.path / "result.json", {"folder": target, "made": True})
    done = panel.watch("convert-1", str(folder), str(folder))
    assert (done[tab.control(MODEL)], done[panel.timer].active) == (target, False)
    elsewhere = panel.watch("convert-1", str(folder), "another model")
    assert tab.control(MODEL) not in elsewhere
    assert "chosen meanwhile stays" in elsewhere[panel.message]
    (job.path / "result.json").unlink()
    write_json(job.path / "error.json", [{"code": "convert-gguf", "field": "", "values": {"file": "f", "why": "w"}}])
    assert "transformers" in panel.watch("convert-1", str(folder), str(folder))[panel.message]
    refused = panel.start(str(tmp_path))  # outside of the model folders
    assert refused.keys() == {panel.message}


def test_the_form_shows_a_spec_and_reads_back_as_that_spec(tab: Tab) -> None:
    spec = RunSpec.read({"name": "mine", "stage": "pt", "data": {"datasets": {"texts": 2}}, "method": "full"})
    updates = tab.summary.fill(spec)
    assert updates.keys() == set(tab.summary.filled)
    assert tab.shown(updates) == spec
    assert updates[tab.control("data.datasets:weights")] == "texts: 2"


def test_a_look_tells_what_the_spec_would_do(tab: Tab) -> None:
    spec = tab.built_with.change("data.datasets", ["numbers"]).change("training.max_steps", 7)
    updates = tab.summary.look("demo", *tab.held(spec))
    assert updates.keys() == set(tab.summary.outputs)
    plan = updates[tab.summary.plan]
    assert f"<dt>{ENGLISH('stat-rows')}</dt><dd>25<small>" in plan
    assert f"<dt>{ENGLISH('stat-steps')}</dt><dd>7<small>" in plan
    assert "<span>Qwen2ForCausalLM</span>" in updates[tab.settings.model_facts]
    assert "max_steps: 7" in updates[tab.summary.yaml]
    assert "--module engine.worker.train" in updates[tab.summary.command]


def test_what_cannot_be_read_is_marked_at_its_field_and_leaves_the_numbers_open(tab: Tab) -> None:
    updates = tab.summary.look("demo", *tab.held(tab.built_with, training__learning_rate="fast"))
    assert updates[tab.summary.plan].count("<dd>—<") >= 4
    assert "#f-training-learning_rate{--wrong:1px" in updates[tab.summary.marks]
    assert ENGLISH("to-fix", count=1) in updates[tab.summary.plan]


def test_a_spec_that_cannot_run_is_not_started_and_the_card_says_why(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webui.train_tab.summary_panel.rows_refused_by_template", lambda *_: [])
    spec = tab.built_with.change("data.datasets", ["gone"])
    updates = tab.summary.submit(ADA, "demo", *tab.held(spec))
    assert "toast bad" in updates[tab.context.message]
    assert tab.context.selected not in updates
    assert "gone" in updates[tab.summary.plan]
    assert not place.saves.exists()


@pytest.mark.parametrize("refused_by", ["form", "template"])
def test_what_cannot_be_read_or_rendered_is_not_even_submitted(
    tab: Tab, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    monkeypatch.setattr("webui.train_tab.summary_panel.runs.submit", lambda *_, **__: pytest.fail("submitted"))
    refused = [problem("template-fails", "data.datasets", reason="roles must alternate")]
    monkeypatch.setattr(
        "webui.train_tab.summary_panel.rows_refused_by_template",
        lambda *_: refused if refused_by == "template" else [],
    )
    typed = {"training__learning_rate": "fast"} if refused_by == "form" else {}
    updates = tab.summary.submit(ADA, "demo", *tab.held(tab.built_with, **typed))
    assert "toast bad" in updates[tab.context.message]
    reason = {"form": "fast", "template": "roles must alternate"}[refused_by]
    assert reason in updates[tab.summary.plan]


def test_a_run_that_is_started_is_shown(tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []

    def submit(spec: RunSpec, workplace: Workplace, by: str) -> Any:
        submitted.append((spec.name, workplace, by))
        return SimpleNamespace(id="demo_model/lora/mine")

    monkeypatch.setattr("webui.train_tab.summary_panel.runs.submit", submit)
    monkeypatch.setattr("webui.train_tab.summary_panel.rows_refused_by_template", lambda *_: [])
    updates = tab.summary.submit(ADA, "demo", *tab.held(tab.built_with.change("name", "mine")))
    assert submitted == [("mine", place, "ada")]
    assert updates.keys() == {tab.context.message, tab.context.selected}
    assert updates[tab.context.selected] == "demo_model/lora/mine"


def test_a_sweep_counts_its_runs_and_starts_them_all_or_none(
    tab: Tab, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_panel, "rows_refused_by_template", lambda *_: [])
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    place.saves.mkdir()
    panel, form = tab.sweep, tab.held(tab.built_with)

    def controls(first: str, second: str, order: str = "grid", count: float | None = 10) -> list[Any]:
        return ["training.learning_rate", first, "method.r", second, "training.seed", "", order, count]

    looked = panel.look(*controls("1e-3, 2e-3", "4, 8, 16"))
    assert (looked[panel.start]["value"], looked[panel.start]["interactive"]) == ("Start 6 runs", True)
    assert not looked[panel.count]["visible"]
    looked = panel.look(*controls("1e-3, 2e-3", "4, 8, 16", "random", 4))
    assert (looked[panel.start]["value"], looked[panel.count]["visible"]) == ("Start 4 runs", True)
    for nothing in (controls("", ""), controls("1, 2", "3", "list"), ["method.r", "1"] * 3 + ["grid", None]):
        assert not panel.look(*nothing)[panel.start]["interactive"]

    refused = panel.submit(ADA, *controls("1e-3", "8, x"), None, False, *form)
    assert "LoRA rank must be a whole number; x was given" in refused[tab.context.message]
    refused = panel.submit(ADA, *controls("1e-3", "8, 0"), None, False, *form)
    assert "must be ≥ 1" in refused[tab.context.message]
    assert runs.find(place.saves) == []
    started = panel.submit(ADA, *controls("1e-3, 2e-3", "8"), 5, True, *form)
    assert "2 runs submitted" in started[tab.context.message]
    members = runs.find(place.saves)[::-1]
    assert started[tab.context.selected] == members[0].id
    assert [(run.by, run.spec.training.learning_rate, run.spec.method.r) for run in members] == [
        ("ada", 1e-3, 8),
        ("ada", 2e-3, 8),
    ]
    assert {run.request["sweep"]["budget_hours"] for run in members} == {5}
    assert [other.id for other in compare.siblings(members[1], compare.training_runs(place.saves))] == [
        members[1].id,
        members[0].id,
    ]


def test_the_page_begins_with_what_it_was_built_with_and_sends_only_what_differs(tab: Tab) -> None:
    updates = tab.presets.begin()
    assert updates[tab.settings.preset] == "demo"
    assert updates.keys() <= set(tab.presets.begins)
    assert not set(tab.settings.inputs) & updates.keys()


def test_a_preset_fills_the_form_and_an_unknown_one_does_nothing(tab: Tab, place: Workplace) -> None:
    updates = tab.presets.choose_preset("demo")
    assert tab.shown(updates) == start_from(place, "demo")[0]
    assert tab.presets.choose_preset("no such preset") == gr.skip()


def test_what_differs_from_the_preset_is_listed_and_reset(tab: Tab) -> None:
    spec = tab.built_with.change("training.learning_rate", 5e-4).change("stage", "dpo").change("stage.beta", 0.3)
    held = tab.held(spec, method__r="<b>")
    plan = tab.summary.look("demo", *held)[tab.summary.plan]
    assert re.findall('data-reset="(.+?)"', plan) == ["stage", "stage.beta", "training.learning_rate", "*"]
    assert "<s>0.002</s> → <b>0.0005</b>" in plan
    assert "data-reset" not in tab.summary.look("demo", *tab.held(tab.built_with))[tab.summary.plan]
    assert "data-reset" not in tab.summary.look(["no such"], *held)[tab.summary.plan]

    def reset(path: Any, preset: str = "demo") -> Updates:
        return tab.summary.reset(SimpleNamespace(_data={"reset": path}), preset, *held)

    assert reset("training.learning_rate") == {tab.control("training.learning_rate"): "0.002"}
    assert reset("stage") == {tab.control("stage"): "sft"}
    assert reset("stage.beta") == {tab.control("stage.beta"): "0.1"}
    assert reset(DATASETS).keys() == {tab.control(DATASETS), tab.control(f"{DATASETS}:weights")}
    everything = reset("*")
    assert everything[tab.control("method.r")] == "16"  # what cannot be read, too
    assert not {tab.control(path) for path in (MODEL, DATASETS, "name")} & everything.keys()
    assert reset("<script>") == reset(None) == reset("stage", "own:none") == gr.skip()


def test_a_preset_is_saved_from_the_form_and_applied_to_another(tab: Tab, place: Workplace) -> None:
    place.saves.mkdir()
    spec = tab.built_with.change("training.learning_rate", 5e-4).change("data.datasets", ["numbers"])

    def act(spec: RunSpec, typed: dict[str, Any] | None = None, **about: Any) -> Updates:
        return tab.own.act(SimpleNamespace(_data=about), "demo", *tab.held(spec, **typed or {}))

    updates = act(spec, do="save", name="<b>Mine", changed=True)
    assert updates[tab.settings.preset]["choices"][0] == ("<b>Mine (your own)", "own:b-Mine")
    assert "&lt;b&gt;Mine" in updates[tab.own.html]
    assert "<b>Mine" not in updates[tab.own.html].replace("<b>&lt;b&gt;Mine", "")
    held = tab.held(tab.built_with, training__seed="not a number")
    updates = tab.presets.choose_preset("own:b-Mine", *held)
    assert updates[tab.control("training.learning_rate")] == "0.0005"
    assert [path for path in tab.settings.form.controls if tab.control(path) in updates] == ["training.learning_rate"]
    assert "changed 1 setting" in updates[tab.context.message]
    assert "<s>0.002</s> → <b>0.0005</b>" in updates[tab.own.html]
    (place.saves / ".presets/b-Mine.yaml").write_text("name: x\nshared: true\nsettings: {training: {warp: 9}}")
    updates = tab.presets.choose_preset("own:b-Mine", *held)
    assert "1 setting of it could not be used" in updates[tab.context.message]
    assert "training.warp" in updates[tab.own.html]
    refused = [
        act(spec, {"training__learning_rate": "fast"}, do="save", name="x"),
        act(spec, do="save", name=""),
        act(tab.built_with, do="save", name="x", changed=True),
        act(spec, do="delete", id="../x"),
        tab.presets.choose_preset("own:none", *held),
    ]
    assert all(update.keys() == {tab.context.message} for update in refused)
    assert all("toast bad" in update[tab.context.message] for update in refused)
    assert act(spec, do="explode") == gr.skip()
    act(spec, do="rename", id="b-Mine", name="Other")
    updates = act(spec, do="delete", id="b-Mine")
    assert "own:" not in str(updates[tab.settings.preset]["choices"])


def test_a_form_comes_back_as_it_was_left(tab: Tab, place: Workplace) -> None:
    typed = {"training__learning_rate": "fast", "stage": "dpo", "method__r": "8"}
    left = dict(zip(tab.settings.form.controls, tab.held(tab.built_with, **typed), strict=True))
    updates = tab.presets.begin(kept.as_text("demo", left))
    shown = {path for path, control in tab.settings.form.controls.items() if control in updates}
    assert shown == {"training.learning_rate", "stage", "method.r"}
    assert updates[tab.control("training.learning_rate")] == "fast"
    assert "fast" in updates[tab.summary.plan]
    wrong = {"stage": "war", "method.r": 8, "data.packing": "yes", "data.datasets": [1], "logging.report_to": ["x"]}
    for text in ("", "[", "[]", "[" * 10_000, '{"values": 1}', kept.as_text(["demo"], wrong | {"no such": 1}), 7):
        updates = tab.presets.begin(text)
        assert not set(tab.settings.inputs) & updates.keys(), text


def test_a_stage_brings_data_sets_that_it_takes(tab: Tab) -> None:
    spec = tab.built_with.change("data.datasets", ["numbers"])
    assert tab.presets.refit_datasets(*tab.held(spec)) == gr.skip()
    updates = tab.presets.refit_datasets(*tab.held(spec, stage="pt"))
    assert updates[tab.control(DATASETS)] == ["texts"]
    assert updates.keys() == {tab.context.message, tab.control(DATASETS), tab.control(f"{DATASETS}:weights")}


def test_a_folder_with_gguf_alone_is_offered_last(place: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "more" / "packed"
    folder.mkdir(parents=True)
    (folder / "model-q8_0.gguf").write_bytes(b"GGUF")
    wider = dataclasses.replace(place, models=(tmp_path / "more", *place.models))
    listed = trainable_models(wider, Words("en"))
    assert listed[-1] == ("packed · GGUF", str(folder))
    assert str(DEMO_MODEL) in {value for _, value in listed[:-1]}


def test_lists_name_what_is_on_disk(tab: Tab, place: Workplace) -> None:
    spec = RunSpec.read({"name": "past", "model": {"model_name_or_path": str(DEMO_MODEL)}})
    adapter = past_run(place.saves, spec).dir.adapter
    whole = past_run(place.saves, spec.change("name", "whole").change("method", {"kind": "full"})).dir.model
    judge = past_run(place.saves, spec.change("name", "judge").change("stage", {"kind": "rm"})).dir.adapter
    updates = tab.settings.list_choices()
    assert updates.keys() == set(tab.settings.lists)
    values = {
        path: [value for _, value in updates[tab.control(path)]["choices"]]
        for path in (MODEL, DATASETS, ADAPTER, "stage.reward_model")
    }
    assert values[DATASETS] == ["numbers", "texts"]
    assert set(values[ADAPTER]) == {str(adapter), str(judge)}
    assert set(values[MODEL]) == {str(DEMO_MODEL), str(whole)}
    assert values["stage.reward_model"] == [str(judge)]


def test_a_model_brings_the_names_of_its_modules(tab: Tab) -> None:
    updates = tab.settings.list_modules(str(DEMO_MODEL))
    assert {"all-linear", "q_proj", "down_proj"} <= set(updates[tab.control(TARGET_MODULES)]["choices"])
    assert "embed_tokens" in updates[tab.control(SAVED_MODULES)]["choices"]
    nothing = tab.settings.list_modules("somebody/away")
    assert nothing[tab.control(TARGET_MODULES)]["choices"] == ["all-linear"]
    assert nothing[tab.control(SAVED_MODULES)]["choices"] == []


def test_a_spec_is_loaded_and_one_of_another_program_with_what_it_lost(tab: Tab) -> None:
    updates = tab.load.load_text("name: mine\ntraining: {learning_rate: 0.5}")
    assert tab.shown(updates).training.learning_rate == 0.5
    assert (updates[tab.load.imported], updates[tab.load.other]) == ("", "")
    command = "llamafactory-cli train --stage sft --learning_rate 0.25 --neftune_noise_alpha 5 --no_such_option 1"
    updates = tab.load.load_file(command.encode("utf-16"))
    assert tab.shown(updates).training.learning_rate == 0.25
    assert "no_such_option" in updates[tab.load.imported]


def test_what_cannot_be_loaded_leaves_the_form_as_it_is(tab: Tab) -> None:
    answers = {tab.context.message, tab.load.imported, tab.load.other}
    for text in ("", "[", "x" * (MAX_YAML_CHARACTERS + 1)):
        updates = tab.load.load_text(text)
        assert updates.keys() == answers
        assert "toast bad" in updates[tab.context.message]
    assert tab.load.load_file(b"\x00\xff\x00" * 9).keys() == answers


def test_an_export_that_is_loaded_here_is_handed_on(tab: Tab) -> None:
    spec = ExportSpec.read({"name": "merged", "model": {"model_name_or_path": str(DEMO_MODEL)}})
    updates = tab.load.load_text(spec.to_yaml())
    assert updates.keys() == {tab.context.message, tab.load.imported, tab.load.other}
    first, _, yaml = updates[tab.load.other].partition("\n")
    assert first.startswith("# ")
    assert yaml == spec.to_yaml()


def test_the_number_of_machines_is_a_question_only_where_there_are_several(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    def is_hidden(spec: RunSpec, setting: str = "num_machines") -> bool:
        return f"#f-hardware-{setting}" in model_html.hidden_parts_css(spec, workplace)

    assert is_hidden(make_spec())
    assert not is_hidden(make_spec(hardware__num_machines=2))  # it is refused, and the mark must be seen
    assert is_hidden(make_spec(), "strategy-sharding")
    hybrid = {"kind": "fsdp2", "sharding": "hybrid"}
    assert not is_hidden(make_spec(hardware__strategy=hybrid), "strategy-sharding")
    (workplace.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    assert not is_hidden(make_spec())
