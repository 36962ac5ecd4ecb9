"""What stands in the way of a run is told before it starts, in one sentence that names the thing and the fix."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core import hardware
from engine.core.problems import Problem
from engine.launch import workspace as workplaces
from engine.launch.workspace import Workplace
from engine.models.chat_templates import TEMPLATE_FOLDER, template_file_problem
from engine.models.checks import model_problems
from engine.models.discovery import hub_cache
from engine.preflight import checks, model_checks, package_checks
from engine.runs.plan import refitted, start_from, summary
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from tests.test_models import CONFIG, QWEN, make_model, safetensors

CHAT = [{"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1}."} for n in range(4)]
TEXT = [{"text": f"After {n} comes {n + 1}."} for n in range(4)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """One small model, one data set of each kind, and no network or card."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    make_model(tmp_path / "models" / "qwen")
    (tmp_path / "data").mkdir()
    (tmp_path / "saves").mkdir()
    made = Workplace(models=(tmp_path / "models",), data=tmp_path / "data", saves=tmp_path / "saves")
    write_data(made, chat=CHAT, text=TEXT)
    return made


COLUMNS = {
    "text": {"columns": {"prompt": "text"}},
    "pairs": {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "thumbs": {"columns": {"prompt": "q", "response": "a", "kto_tag": "up"}},
}


def write_data(place: Workplace, **sets: Any) -> None:
    """Each data set as rows, or as the very text of its file."""
    info = {}
    for name, rows in sets.items():
        lines = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        (place.data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl"}
        if name in COLUMNS:
            info[name] |= COLUMNS[name]
    (place.data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def make_spec(place: Workplace, **changes: Any) -> RunSpec:
    """A spec that could start; keywords are paths with `__` for the dot."""
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": "qwen"},
            "data": {"datasets": ["chat"], "dataset_dir": str(place.data), "max_length": 64},
        }
    )
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return spec


def told(place: Workplace, **changes: Any) -> list[Problem]:
    spec = place.frozen(make_spec(place, **changes))
    return spec_problems(spec) + checks.preflight_problems(spec, place)


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, [str(one) for one in found]
    assert found[0].text("zh") != found[0].text("en")
    return found[0]


def test_nothing_stands_in_the_way_of_a_plain_run(place: Workplace) -> None:
    assert told(place) == []


# ------------------------------------------------------------------------------------------ the model


def test_of_a_missing_model_the_nearest_is_named(place: Workplace) -> None:
    assert "qwen" in only(told(place, model__model_name_or_path="qwem")).text()


def test_of_the_small_real_model_it_is_told_how_to_make_it(place: Workplace) -> None:
    [wrong] = model_problems("/gone/SmolLM2-135M-Instruct", place.model_roots)
    assert wrong.code == "model-smollm2"
    assert "make smollm2" in wrong.text()
    assert "make smollm2" in wrong.text("zh")


def test_of_a_half_downloaded_model_the_missing_shard_is_named(place: Workplace) -> None:
    folder = place.models[0] / "half"
    make_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in QWEN}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors" in only(told(place, model__model_name_or_path="half")).text()


def test_gguf_is_told_apart_from_a_model_that_can_be_trained(place: Workplace) -> None:
    (place.models[0] / "small.gguf").write_bytes(b"GGUF")
    assert only(told(place, model__model_name_or_path="small.gguf")).code == "model-gguf"


@pytest.mark.parametrize("given", ["../../etc/passwd", "/etc", "; rm -rf /", "$(id)", "-rf", "x" * 300])
@pytest.mark.parametrize(
    "field", ["model.model_name_or_path", "model.adapter_path", "model.chat_template", "data.dataset_dir"]
)
def test_a_path_that_is_none_of_ours_is_a_problem_and_never_an_error(place: Workplace, field: str, given: str) -> None:
    plan = summary(make_spec(place).change(field, given), place)
    assert {one.field for one in plan.problems} == {field}
    assert (plan.rows is None) == (field == "data.dataset_dir")
    assert (plan.parameters is None) == (field in model_checks.MODEL_FIELDS)


def test_a_name_too_long_for_a_file_is_no_error_inside_the_roots_either(place: Workplace) -> None:
    for field, root in (("data.dataset_dir", place.data), ("model.chat_template", place.data)):
        found = only(told(place, **{field.replace(".", "__"): f"{root}/{'长' * 100}.jinja"}))
        assert found.field == field


def test_what_lies_outside_is_not_looked_into(place: Workplace, tmp_path: Path) -> None:
    stranger = Workplace(models=(tmp_path / "other",), data=tmp_path / "none", saves=place.saves)
    spec = make_spec(place, model__model_name_or_path=str(place.models[0] / "qwen"))
    plan = summary(spec.change("model.chat_template", f"{place.data}/no.jinja"), stranger)
    assert (plan.rows, plan.parameters, plan.trainable) == (None, None, None)
    assert {one.code for one in plan.problems} == {"path-outside", "model-outside-roots"}


def test_names_with_spaces_and_in_chinese_are_names(place: Workplace) -> None:
    make_model(place.models[0] / "my model 第二版")
    write_data(place, **{"问答 two": CHAT})
    spec = make_spec(place, model__model_name_or_path="my model 第二版", data__datasets=["问答 two"])
    plan = summary(spec, place)
    assert (plan.problems, plan.rows) == ([], 4)
    assert plan.parameters


def test_own_code_is_allowed_by_any_name_of_the_model(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = hub_cache() / "models--org--odd" / "snapshots" / "abc"
    make_model(snapshot, model_type="odd", auto_map={"AutoConfig": "x.X"})
    make_model(place.models[0] / "odd", model_type="odd", auto_map={"AutoConfig": "x.X"})
    for allowed, chosen in (("models/odd", "odd"), ("odd", "models/odd"), ("org/odd", str(snapshot))):
        given = SimpleNamespace(
            models=list(place.models),
            data=place.data,
            saves=place.saves,
            reward_files=None,
            allow_remote_code=[allowed],
            import_from=None,
        )
        changes = {"model__model_name_or_path": chosen, "model__trust_remote_code": True}
        assert told(workplaces.from_arguments(given), **changes) == []
        assert {one.code for one in told(place, **changes)} == {"model-remote-code"}


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("tokenizer.json", '{"model": ', "model-json-broken"),
        ("tokenizer.json", "{}", "model-tokenizer-broken"),
        ("tokenizer_config.json", '{"chat_template": "x",}', "model-json-broken"),
        ("config.json", '{"architectures": [', "model-json-broken"),
        ("config.json", json.dumps(CONFIG | {"hidden_size": 32}), "model-config-differs"),
    ],
)
def test_a_damaged_file_of_the_model_is_told_before_the_start(
    place: Workplace, file: str, content: str, code: str
) -> None:
    (place.models[0] / "qwen" / file).write_text(content)
    found = next(one for one in told(place) if one.field == "model.model_name_or_path")
    assert found.code == code
    assert file in found.text()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_damaged_chat_template_is_told_at_its_field_and_another_one_helps(place: Workplace, name: str) -> None:
    template = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    file = place.models[0] / "qwen" / name
    file.write_text(json.dumps({"chat_template": template}) if name.endswith("json") else template)
    found = only(told(place))
    assert (found.field, found.code, found.values["line"]) == ("model.chat_template", "template-broken", 2)
    assert told(place, model__chat_template="chatml") == []
    assert told(place, stage={"kind": "pt"}, data__datasets=["text"]) == []


def test_a_chosen_template_is_read_too(place: Workplace) -> None:
    file = place.data / "own.jinja"
    for content, code in (
        (b"{% if %}", "template-broken"),
        (b"\xff\xfe", "file-not-text"),
        (b"{{" * 2**20, "template-too-large"),
    ):
        file.write_bytes(content)
        found = only(told(place, model__chat_template=str(file)))
        assert (found.field, found.code) == ("model.chat_template", code)
    file.write_text(
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert told(place, model__chat_template=str(file)) == []


def test_every_template_that_comes_with_athanor_is_sound(place: Workplace) -> None:
    for file in TEMPLATE_FOLDER.glob("*.jinja"):
        assert told(place, model__chat_template=file.stem) == []
        assert template_file_problem(file) is None


def test_a_model_that_is_stretched_already_is_not_stretched_again(place: Workplace) -> None:
    make_model(place.models[0] / "long", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    stretched = {"model__rope_scaling": {"kind": "linear", "factor": 2.0}}
    assert told(place, **stretched) == []
    found = only(told(place, model__model_name_or_path="long", **stretched))
    assert (found.field, found.values["own"]) == ("model.rope_scaling", "yarn")


# ------------------------------------------------------------------------------------------ the method


def test_of_a_wrong_target_the_nearest_is_named(place: Workplace) -> None:
    assert "q_proj" in only(told(place, method__target_modules=["q_prj"])).text()


@pytest.mark.parametrize(
    ("targets", "code"),
    [
        (["lm_head"], "lora-on-head"),
        (["q_proj", "model.lm_head"], "lora-on-head"),
        (["all-linear", "q_proj"], "all-linear-alone"),
    ],
)
def test_targets_that_training_would_refuse_or_ignore_are_refused_now(
    place: Workplace, targets: list[str], code: str
) -> None:
    assert code in {one.code for one in told(place, method__target_modules=targets)}


def test_modules_to_train_are_full_names_as_in_training(place: Workplace) -> None:
    good = {"kind": "freeze", "trainable_modules": ["model.layers.1", "lm_head", "model.norm.weight"]}
    assert told(place, method=good) == []
    found = only(told(place, method={"kind": "freeze", "trainable_modules": ["model.layers.1", "layers.2"]}))
    assert (found.field, found.values["given"]) == ("method.trainable_modules", "layers.2")


def make_adapter(place: Workplace, **settings: Any) -> Path:
    """An adapter as peft writes it, of rank 16, on one matrix."""
    folder = place.saves / "run" / "adapter"
    folder.mkdir(parents=True)
    base = str(place.models[0] / "qwen")
    config = {"base_model_name_or_path": base, "r": 16, "lora_alpha": 32, "use_dora": False} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors(folder / "adapter_model.safetensors", {"q.lora_A.weight": (16, 16), "q.lora_B.weight": (16, 16)})
    return folder


def test_an_adapter_goes_on_and_its_own_weights_are_counted(place: Workplace) -> None:
    make_adapter(place)
    plan = summary(make_spec(place, model__adapter_path="run/adapter"), place)
    assert (plan.problems, plan.trainable) == ([], 512)
    assert str(place.saves / "run" / "adapter") in plan.yaml


@pytest.mark.parametrize(("setting", "value"), [("r", 8), ("lora_alpha", 8), ("use_dora", True), ("use_rslora", True)])
def test_a_setting_that_differs_from_the_adapters_names_both_values(place: Workplace, setting: str, value: Any) -> None:
    make_adapter(place, **{setting: value})
    found = only(told(place, model__adapter_path="run/adapter"))
    ours = getattr(RunSpec().method, setting)
    assert (found.field, found.values) == (f"method.{setting}", {"given": ours, "adapter": value})


def test_an_adapter_of_another_model_is_refused_but_not_of_the_same_one_moved(place: Workplace) -> None:
    folder = make_adapter(place, base_model_name_or_path="Org/llama")
    assert only(told(place, model__adapter_path=str(folder))).code == "adapter-other-base"
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("Org/llama", "/before/qwen"))
    assert told(place, model__adapter_path=str(folder)) == []


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_the_adapters_files_names_it(place: Workplace, file: str) -> None:
    folder = make_adapter(place)
    (folder / file).unlink()
    assert only(told(place, model__adapter_path=str(folder))).values["file"] == file


# ------------------------------------------------------------------------------------------ the data


def test_a_broken_line_is_named_by_line_and_column(place: Workplace) -> None:
    lines = [json.dumps(row) for row in CHAT]
    lines[2] = '{"instruction": oops}'
    write_data(place, broken="\n".join(lines))
    texts = [one.text() for one in told(place, data__datasets=["broken"])]
    assert any("broken.jsonl:3" in text and "column 17" in text for text in texts), texts


def test_a_value_of_another_type_is_named_by_line_and_column_name(place: Workplace) -> None:
    write_data(place, mixed=[*CHAT, CHAT[0] | {"output": 7}])
    texts = [one.text() for one in told(place, data__datasets=["mixed"])]
    assert any("mixed.jsonl:5" in text and "'output'" in text for text in texts), texts


def test_columns_that_were_put_right_in_the_catalogue_are_looked_at_again(place: Workplace) -> None:
    write_data(place, asked=[{"q": row["instruction"], "a": row["output"]} for row in CHAT])
    assert told(place, data__datasets=["asked"])
    info = json.loads((place.data / "dataset_info.json").read_text(encoding="utf-8"))
    info["asked"]["columns"] = {"prompt": "q", "response": "a"}
    (place.data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    assert not told(place, data__datasets=["asked"])


def test_an_empty_file_is_told(place: Workplace) -> None:
    write_data(place, nothing="")
    assert "dataset-empty" in {one.code for one in told(place, data__datasets=["nothing"])}


@pytest.mark.parametrize(("stage", "wrong", "right"), [("pt", "chat", "text"), ("sft", "text", "chat")])
def test_data_of_another_kind_names_what_would_fit(place: Workplace, stage: str, wrong: str, right: str) -> None:
    found = only(told(place, stage={"kind": stage}, data__datasets=[wrong]))
    assert found.values["name"] == wrong
    assert right in found.values["fitting"]


def test_thumbs_that_all_point_one_way_are_told_before_the_start(place: Workplace) -> None:
    rows = [{"q": "Hi", "a": f"Hello {n}", "up": True} for n in range(5)]
    kto = {"stage": {"kind": "kto"}, "data__datasets": ["thumbs"]}
    write_data(place, thumbs=rows)
    assert only(told(place, **kto)).code == "thumbs-all-good"
    write_data(place, thumbs=[*rows, rows[0] | {"up": False}])
    assert told(place, **kto) == []


def test_a_reward_model_needs_a_family_that_has_one(place: Workplace) -> None:
    rm = {"stage": {"kind": "rm"}, "data__datasets": ["pairs"]}
    write_data(place, pairs=[{"q": "Hi", "good": "Hello", "bad": "No"}])
    assert told(place, **rm) == []
    config = place.models[0] / "qwen" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bamba"}))
    found = only(told(place, **rm))
    assert (found.code, found.values["model_type"]) == ("no-score-head", "bamba")


def test_what_judges_is_no_start_for_what_writes_and_the_other_way_round_it_is(place: Workplace) -> None:
    write_data(place, pairs=[{"q": "Hi", "good": "Hello", "bad": "No"}])
    pairs = {"data__datasets": ["pairs"], "model__adapter_path": "run/adapter"}
    folder = make_adapter(place, task_type="SEQ_CLS")
    assert only(told(place, stage={"kind": "dpo"}, **pairs)).code == "adapter-scores"
    assert told(place, stage={"kind": "rm"}, **pairs) == []
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("SEQ_CLS", "CAUSAL_LM"))
    assert told(place, stage={"kind": "rm"}, **pairs) == []


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"data__packing": True}, False),
        ({"data__too_long": "drop"}, False),
        ({"stage": {"kind": "pt"}, "data__datasets": ["text"]}, False),
    ],
)
def test_a_plan_says_whether_its_steps_are_an_estimate(place: Workplace, changes: dict[str, Any], exact: bool) -> None:
    plan = summary(make_spec(place, **changes), place)
    assert (plan.problems, plan.exact, plan.rows) == ([], exact, 4)


def test_a_preset_takes_a_data_set_that_is_there(place: Workplace) -> None:
    write_data(place, broken='{"instruction": oops', text=TEXT, chat=CHAT)
    spec, said = start_from(place, "demo")
    assert spec.data.datasets == {"chat": 1}
    assert "alpaca_translate_zh" in said.text()
    assert "chat" in said.text("zh")
    write_data(place, text=TEXT)
    spec, said = start_from(place, "demo")
    assert (spec.data.datasets, said.code) == ({}, "preset-no-data")
    write_data(place, alpaca_translate_zh=CHAT)
    assert start_from(place, "demo") == (place.preset("demo"), None)


def test_a_single_set_that_does_not_fit_the_stage_gives_way_to_one_that_does(place: Workplace) -> None:
    pairs = [{"q": "Hi", "good": "Hello", "bad": "No"}]
    write_data(place, chat=CHAT, text=TEXT, pairs=pairs)
    spec = make_spec(place, stage={"kind": "dpo"}, data__datasets={"chat": 2.0})
    changed, said = refitted(spec, place)
    assert changed.data.datasets == {"pairs": 1}
    assert {"chat", "pairs"} <= set(said.text().replace(",", "").split())
    assert refitted(changed, place) == (changed, None)
    for kept in (["chat", "text"], ["chat", "pairs"], []):
        several = spec.change("data.datasets", kept)
        assert refitted(several, place) == (several, None)
    write_data(place, chat=CHAT)
    assert refitted(spec, place) == (spec, None)  # none is there that would fit


# ------------------------------------------------------------------------------------------ the machine


def test_a_saves_folder_without_write_permission_is_told(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the answer of the system is put in its mouth.
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    assert only(told(place)).code == "saves-not-writable"


def test_fp16_needs_a_card(place: Workplace) -> None:
    assert only(told(place, training__precision="fp16")).code == "fp16-on-cpu"


@pytest.mark.parametrize(
    ("optimizer", "packages"),
    [
        ("adamw_torch_8bit", {"torchao"}),
        ("adamw_torch_xla", {"torch_xla"}),
        ("adamw_anyprecision", {"torchdistx"}),
        ("galore_adamw_8bit_layerwise", {"galore_torch", "bitsandbytes"}),
        ("galore_adafactor", {"galore_torch"}),
        ("paged_adamw_8bit", {"bitsandbytes"}),
        ("ademamix", {"bitsandbytes"}),
        ("adalomo", {"lomo_optim"}),
        ("stable_adamw", {"torch-optimi"}),
        ("schedule_free_sgd", {"schedulefree"}),
        ("adamw_torch_fused", set()),
    ],
)
def test_an_optimizer_names_the_packages_that_it_imports(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, optimizer: str, packages: set[str]
) -> None:
    monkeypatch.setattr(package_checks.importlib.util, "find_spec", lambda _: None)
    found = [one for one in told(place, training__optim=optimizer) if one.code == "package-missing"]
    assert {one.values["package"] for one in found} == packages


@pytest.mark.parametrize(("said", "threads"), [("4,2", 4), ("3", 3), ("", None), ("all", None), ("0", None)])
def test_threads_are_the_first_number_that_is_said_or_the_cores(
    monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert hardware.threads() == (threads or len(os.sched_getaffinity(0)))


# ------------------------------------------------------------------------------------------ rewards


def rewarded(place: Workplace, **stage: Any) -> list[Problem]:
    return told(place, stage={"kind": "grpo", "max_new_tokens": 64, **stage})


def test_a_reward_file_runs_only_from_a_folder_that_the_operator_named(place: Workplace, tmp_path: Path) -> None:
    allowed, elsewhere = tmp_path / "rewards", tmp_path / "mine.py"
    allowed.mkdir()
    for file in (allowed / "good.py", elsewhere):
        file.write_text("def reward(prompt, completion, answer):\n    return 1\n")
    (allowed / "link.py").symlink_to(elsewhere)
    opened = replace(place, reward_files=(allowed,))
    for path in (
        str(elsewhere),
        str(allowed / "link.py"),
        str(allowed / ".." / "mine.py"),
        "/etc/passwd",
        "mine.py",
    ):
        assert only(rewarded(opened, rewards=["file"], reward_file=path)).code == "reward-file-not-allowed"
    assert only(rewarded(place, rewards=["file"], reward_file=str(allowed / "good.py"))).field == "stage.reward_file"
    assert rewarded(opened, rewards=["file"], reward_file="good.py") == []
    missing = only(rewarded(opened, rewards=["file"], reward_file=str(allowed / "god.py")))
    assert missing.code == "reward-file-missing"
    assert str(allowed) in missing.text()


def test_folders_of_reward_files_are_named_by_flag_or_environment(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    workplaces.add_arguments(parser)
    saves = ["--saves", str(place.saves)]
    assert workplaces.from_arguments(parser.parse_args(saves)).reward_files == ()
    flags = parser.parse_args([*saves, "--reward-files", str(tmp_path / "a"), str(tmp_path / "b")])
    assert workplaces.from_arguments(flags).reward_files == (tmp_path / "a", tmp_path / "b")
    monkeypatch.setenv("ATHANOR_REWARD_FILES", f"{tmp_path / 'c'}:{tmp_path / 'd'}")
    assert workplaces.from_arguments(parser.parse_args(saves)).reward_files == (
        tmp_path / "c",
        tmp_path / "d",
    )


def test_a_reward_model_has_to_be_the_result_of_a_reward_model_run(place: Workplace, tmp_path: Path) -> None:
    result = place.saves / "qwen" / "lora" / "one" / "adapter"
    result.mkdir(parents=True)
    (result / "result.json").write_text(json.dumps({"stage": "sft"}))
    inside = only(rewarded(place, rewards=["reward_model"], reward_model=str(result)))
    assert (inside.code, inside.field) == ("reward-is-none", "stage.reward_model")
    outside = only(rewarded(place, rewards=["reward_model"], reward_model=str(tmp_path / "elsewhere")))
    assert (outside.code, outside.field) == ("path-outside", "stage.reward_model")


def test_a_reward_that_compares_needs_data_with_answers(place: Workplace) -> None:
    asked = [{"messages": [{"role": "user", "content": f"What comes after {n}?"}]} for n in range(4)]
    write_data(place, chat=CHAT, asked=asked)
    info = json.loads((place.data / "dataset_info.json").read_text())
    info["asked"]["formatting"] = "openai"
    (place.data / "dataset_info.json").write_text(json.dumps(info))
    changes = {"stage": {"kind": "grpo", "max_new_tokens": 64, "rewards": ["exact"]}}
    assert told(place, **changes) == []
    assert only(told(place, **changes, data__datasets={"asked": 1})).code == "references-not-there"
    assert told(place, **changes, data__datasets={"asked": 1, "chat": 1}) == []
    changes["stage"] |= {"rewards": ["format"], "reward_pattern": ".+"}
    assert told(place, **changes, data__datasets={"asked": 1}) == []


def test_questions_and_answers_have_to_fit_into_the_context_together(place: Workplace) -> None:
    found = only(rewarded(place, rewards=["exact"], max_new_tokens=10**6))
    assert (found.code, found.field) == ("context-without-answer", "data.max_length")
