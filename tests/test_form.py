"""The form says exactly what the spec says, both ways, and nothing a person types can break it."""

from __future__ import annotations

import gradio as gr
import pytest

from engine.launch.workspace import Workplace
from engine.models.trainable_modules import fully_trainable_modules, linear_modules
from engine.runs.plan import Summary
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields
from tests.test_models import make_model
from webui import notices, train_tab
from webui.form import controls, reading, settings, writing
from webui.train_tab import plan_html
from webui.train_tab.choices import local_model
from webui.words import Words

FULL = {
    "name": "翻译",
    "stage": {"kind": "sft", "train_on": "last_answer"},
    "model": {
        "model_name_or_path": "models/a",
        "quantization": {"kind": "4bit", "bnb_4bit_quant_type": "fp4"},
        "rope_scaling": {"kind": "yarn", "factor": 4},
        "adapter_path": "saves/x",
    },
    "method": {"kind": "lora", "r": 64, "target_modules": ["q_proj", "v_proj"], "loraplus_lr_ratio": 16},
    "data": {
        "datasets": {"identity": 2, "c4_demo": 0.5, "plain": 1},
        "eval_datasets": ["held_out"],
        "max_samples": 1000,
    },
    "training": {"learning_rate": 3e-5, "max_steps": 10, "num_train_epochs": 1.5},
    "logging": {"report_to": ["wandb", "mlflow"], "save_total_limit": None},
    "hardware": {"devices": [0, 3], "num_processes": 2},
    "extra": {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 2}},
}

SPECS = {
    "default": {},
    "full": FULL,
    "other kinds": {
        "stage": "pt",
        "method": "freeze",
        "model": {"quantization": "8bit", "rope_scaling": "linear"},
    },
    "small": {"method": "full"},
    "rewards": {"stage": {"kind": "grpo", "rewards": {"exact": 1, "length": -0.5}, "reward_length": 8}},
}


def shown(given: dict | None = None) -> dict:
    return writing.defaults() | writing.chosen_values(RunSpec.read(given or {}))


@pytest.mark.parametrize("name", SPECS)
def test_what_the_form_shows_of_a_spec_reads_back_as_that_spec(name):
    spec = RunSpec.read(SPECS[name])
    assert reading.read(writing.defaults() | writing.chosen_values(spec)) == (spec, [])


def test_every_setting_has_a_control_and_every_control_is_filled():
    assert set(settings.paths()) == set(fields()) | set(settings.WEIGHTS)
    assert set(shown()) == set(settings.paths())
    assert all(settings.control_kind(path) in controls.CONTROLS for path in settings.paths())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_control_is_built_for_every_setting_and_holds_what_the_page_begins_with(language):
    begun = RunSpec().change("training.learning_rate", 3e-4)
    with gr.Blocks(analytics_enabled=False):
        placed = controls.Form(Words(language), begun)
        for path in settings.paths():
            placed.place(path)
    assert {control: control.value for control in placed.inputs} == placed.updates(begun)
    assert placed.first(writing.control_values(begun)) == {}
    changed = placed.controls["training.learning_rate"]
    assert placed.first(writing.control_values(RunSpec())) == {
        changed: writing.chosen_values(RunSpec())["training.learning_rate"]
    }


NUMBERS = [path for path in fields() if settings.control_kind(path) == "number"]


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize(
    "typed", ["abc", "<script>alert(1)</script>", "../../etc/passwd", "nan", "1e999", "-1e9", "1" * 5000]
)
def test_a_bad_number_is_a_problem_at_its_field_and_nothing_is_clamped(path, typed):
    kind = settings.kinds_of(path)
    values = shown({settings.union_of(path): kind[0]} if kind and "." not in settings.union_of(path) else {})
    if kind:
        values[settings.union_of(path)] = kind[0]
    spec, problems = reading.read(values | {path: typed})
    assert [one.field for one in problems] == [path]
    assert isinstance(spec, RunSpec)


@pytest.mark.parametrize("path", NUMBERS)
def test_an_empty_number_is_none_where_that_means_something_and_a_problem_elsewhere(path):
    values = shown()
    if kinds := settings.kinds_of(path):
        values[settings.union_of(path)] = kinds[0]
    for empty in ("", "  ", None):
        problems = reading.read(values | {path: empty})[1]
        assert bool(problems) != settings.optional(path)


def test_all_bad_values_are_told_at_once():
    bad = {
        "training.seed": "x",
        "training.learning_rate": "",
        "data.max_length": "7",
        "extra": "a: [1",
        "method.r": "0",
    }
    problems = reading.read(shown() | bad)[1]
    assert {one.field for one in problems} == set(bad)


def test_digits_of_a_chinese_keyboard_are_digits():
    spec, problems = reading.read(shown() | {"training.seed": "１２３", "hardware.devices": "０，１、2"})
    assert not problems
    assert spec.training.seed == 123
    assert spec.hardware.devices == [0, 1, 2]


def test_targets_are_picked_and_a_pasted_list_of_them_is_taken_apart():
    spec, problems = reading.read(shown() | {"method.target_modules": ["q_proj", "k_proj,v_proj，o_proj"]})
    assert not problems
    assert spec.method.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_targets_to_pick_are_the_modules_of_the_chosen_model(tmp_path):
    make_model(tmp_path / "models" / "qwen")
    place = Workplace(models=(tmp_path / "models",), data=tmp_path, saves=tmp_path)
    model = local_model("qwen", place)
    assert linear_modules(model)[0] == "q_proj"
    assert set(fully_trainable_modules(model)) == {"embed_tokens", "lm_head"}
    for nothing in ("", None, "qwem", "x" * 300, "a\0b", "/etc"):
        assert local_model(nothing, place) is None


def test_a_new_model_renews_its_modules_before_the_form_is_looked_at(tmp_path):
    with gr.Blocks(analytics_enabled=False) as page:
        tab = train_tab.build(Words("en"), Workplace(data=tmp_path), gr.HTML(), lambda _: "", gr.Textbox())
        model = next(one for one in tab.inputs if one.elem_id == settings.element_id(settings.MODEL))
    first, _look = [one for one in page.fns.values() if (model._id, "change") in one.targets]
    named = [settings.element_id(path) for path in (settings.TARGET_MODULES, settings.SAVED_MODULES)]
    assert [one.elem_id for one in first.outputs] == named


@pytest.mark.parametrize(("packing", "told"), [(False, "<dd>4<"), (True, "<dd>≈ 4<")])
def test_an_estimate_is_shown_as_one(packing, told):
    spec = RunSpec.read({"data": {"packing": packing}})
    plan = Summary(4, 4, not packing, None, None, [], "", "", [])
    assert plan_html.plan(spec, plan, [], Words("en"), known=True).count(told) == 2


def test_settings_of_a_kind_that_is_not_chosen_are_not_read():
    spec, problems = reading.read(shown() | {"method": "full", "method.r": "nonsense"})
    assert not problems
    assert spec.method.kind == "full"


@pytest.mark.parametrize("union", SPEC_CHOICES)
def test_a_kind_that_does_not_exist_is_a_problem_at_the_choice(union):
    problems = reading.read(shown() | {union: "<b>"})[1]
    assert union in {one.field for one in problems}


@pytest.mark.parametrize(
    "typed",
    ["identity: lots", "identity: -1", "[1, 2]", "identity: [", "2026-99-99", "just words", "identity: *a"],
)
def test_weights_that_make_no_sense_are_a_problem_at_the_data_sets(typed):
    problems = reading.read(shown({"data": {"datasets": ["identity"]}}) | {"data.datasets:weights": typed})[1]
    assert {settings.setting_of(one.field) for one in problems} == {"data.datasets"}


def test_a_weight_of_a_set_that_is_not_chosen_is_told_and_not_dropped():
    problems = reading.read(shown({"data": {"datasets": ["identity"]}}) | {"data.datasets:weights": "identiy: 2"})[1]
    assert [one.code for one in problems] == ["weight-without-set"]


def test_weights_of_rewards_are_read_where_there_are_rewards_and_not_looked_at_elsewhere():
    typed = {"stage.rewards:weights": "exact: 2, lenght: 3"}
    spec, problems = reading.read(shown(SPECS["rewards"]) | typed)
    assert spec.stage.rewards == {"exact": 2, "length": 1}
    assert [(one.code, one.field) for one in problems] == [("weight-without-set", "stage.rewards")]
    assert reading.read(shown() | typed)[1] == []


@pytest.mark.parametrize(
    "typed",
    [
        "- a",
        "just words",
        "a: [1",
        "a: &a [1]\nb: *a",
        "[" * 100_000,
        "!!python/object:os.system {}",
        "x: 2026-99-99",
    ],
)
def test_further_arguments_that_are_no_mapping_are_a_problem(typed):
    assert [one.field for one in reading.read(shown() | {"extra": typed})[1]] == ["extra"]


def test_hostile_values_of_the_wrong_type_are_problems_too():
    for path in settings.paths():
        for value in ({"a": 1}, [["x"]], 10**400, True, b"\xff"):
            spec, _ = reading.read(shown() | {path: value} if path not in SPEC_CHOICES else shown())
            assert isinstance(spec, RunSpec)


def test_a_problem_speaks_of_its_field_by_its_label():
    problem = reading.read(shown() | {"training.seed": "x"})[1][0]
    assert "Seed" in notices.sentence(problem, Words("en"))
    assert "随机种子" in notices.sentence(problem, Words("zh"))


def test_marks_cannot_break_out_of_their_style_sheet():
    hostile = '</style><script>alert(1)</script>";}*{display:none'
    problems = reading.read(shown() | {"training.seed": hostile})[1]
    sheet = notices.marks(problems, Words("en"))
    assert sheet.count("<") == 2  # <style> and </style>
    assert "display:none" not in sheet
    assert "<script" not in notices.listed(problems, Words("en"))


def test_numbers_are_written_as_people_write_them():
    assert [writing.number_text(value) for value in (3.0, 1e-5, 0.0001, 0.05, 1e20, None, 42)] == [
        "3",
        "1e-5",
        "0.0001",
        "0.05",
        "1e20",
        "",
        "42",
    ]
