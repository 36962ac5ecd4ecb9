"""RunSpec: one value, every setting declared once, and everything that is wrong with it said at once."""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any

import pytest
import yaml

from engine.core.problems import Refusal
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.spec.contradictions import spec_problems
from engine.spec.generation_settings import GenerationSettings
from engine.spec.parts import Part
from engine.spec.run_spec import Optimizer, RunSpec, Scheduler, fields
from engine.spec.schedules import schedule_arguments as schedule_arguments
from engine.spec.steps import optimizer_steps
from engine.spec.trainer_arguments import trainer_arguments
from engine.spec.yaml_text import read_yaml, write_yaml
from tests.preloaded import run_python


def refused(given: Any, whole: type[Part] = RunSpec) -> dict[str, str]:
    with pytest.raises(Refusal) as caught:
        whole.read(given)
    return {one.field: one.text() for one in caught.value.problems}


def test_a_spec_survives_yaml_both_ways() -> None:
    for preset in Workplace().presets():
        spec = Workplace().preset(preset)
        assert RunSpec.from_yaml(spec.to_yaml()) == spec
        assert RunSpec.from_yaml(spec.to_yaml(brief=True)) == spec


def test_short_forms_mean_the_long_ones() -> None:
    short = RunSpec.from_yaml("{stage: pt, method: full, data: {datasets: [a, b]}, model: {quantization: 8bit}}")
    assert (short.stage.kind, short.method.kind) == ("pt", "full")
    assert short.data.datasets == {"a": 1, "b": 1}
    assert short.model.quantization.kind == "8bit"


def test_all_problems_come_at_once_each_at_its_field() -> None:
    found = refused(
        {
            "methd": "lora",
            "method": {"kind": "lora", "r": -1},
            "training": {"learning_rat": 1, "seed": "x"},
            "data": {"datasets": {"a": 0}},
            "stage": "dance",
        }
    )
    assert set(found) == {
        "methd",
        "method.r",
        "training.learning_rat",
        "training.seed",
        "data.datasets.a",
        "stage",
    }
    assert "Did you mean 'method'?" in found["methd"]
    assert "Did you mean 'training.learning_rate'?" in found["training.learning_rat"]
    assert "≥ 1; -1 was given" in found["method.r"]


@pytest.mark.parametrize(
    ("text", "sentence", "chinese"),
    [
        ("training: {seed: null}", "training.seed must be a whole number; nothing was given.", "当前为 空值"),
        ("stage: null", "stage cannot be empty. Choose one of: pt, sft", "stage 不能是 空值"),
        ("stage: {kind: null}", "stage cannot be empty. Choose one of: pt, sft", "stage 不能是 空值"),
        ("model: null", "model must be a mapping; nothing was given.", "model 应为映射"),
        (
            "data: {datasets: a}",
            "data.datasets must be a list of names, as in [a, b], or a "
            "mapping of names to weights, as in {a: 1, b: 0.5}; a was given.",
            "应为名称列表",
        ),
        ("training: {optim: AdamW}", "Similar: adamw_torch, adamw_torch_fused, adamw_8bit, ", "相近的有：adamw_torch,"),
        ("training: {optim: sgdd}", "Similar: sgd. See", "相近的有：sgd。"),
        ("training: {optim: muon}", "Common choices: adamw_torch, ", "常用的有：adamw_torch, "),
        ("training: {lr: 1}", "Did you mean 'training.learning_rate'?", "training.learning_rate"),
        (
            "training: {batch_size: 1}",
            "Did you mean 'training.per_device_train_batch_size'?",
            "per_device_train_batch_size",
        ),
        ("training: {epochs: 1}", "Did you mean 'training.num_train_epochs'?", "num_train_epochs"),
        ("data: {dataset: a}", "Did you mean 'data.datasets'?", "data.datasets"),
        ("dataset: a", "Did you mean 'data.datasets'?", "data.datasets"),
        ("trainig: {}", "Did you mean 'training'?", "“training”"),
        (
            "nonsense: 1",
            "There is no setting 'nonsense'. If it is an argument of the trainer, put it under extra",
            "extra",
        ),
    ],
)
def test_what_cannot_be_is_told_with_what_was_meant(text: str, sentence: str, chinese: str) -> None:
    with pytest.raises(Refusal) as refused:
        RunSpec.from_yaml(text)
    (problems,) = refused.value.problems
    assert sentence in str(problems)
    assert chinese in problems.text("zh")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**9, "", None, "much", [], {}])
def test_absurd_learning_rates_are_refused(value: Any) -> None:
    assert "training.learning_rate" in refused({"training": {"learning_rate": value}})


@pytest.mark.parametrize(
    ("given", "field", "code"),
    [
        ({"logging": {"save_steps": True}}, "logging.save_steps", "spec-type-int"),
        ({"training": {"max_steps": False}}, "training.max_steps", "spec-type-int"),
        ({"method": {"kind": "lora", "r": True, "use_dora": True}}, "method.r", "spec-type-int"),
        ({"hardware": {"devices": [0, True]}}, "hardware.devices", "spec-type-int"),
        ({"training": {"learning_rate": True}}, "training.learning_rate", "spec-type-float"),
        ({"data": {"datasets": {"a": True}}}, "data.datasets", "spec-type-float"),
    ],
)
def test_true_is_not_taken_for_the_number_one(given: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        RunSpec.read(given)
    assert [(each.field, each.code) for each in refused.value.problems] == [(field, code)]


def test_settings_of_another_kind_are_absent_not_ignored() -> None:
    assert "method.r" in refused({"method": {"kind": "full", "r": 8}})
    assert "r" not in RunSpec.read({"method": "full"}).model_dump()["method"]


@pytest.mark.parametrize(
    ("whole", "given", "field", "told"),
    [
        (EvaluationSpec, {"data": {"packing": True}}, "data.packing", "There is no setting 'data.packing'"),
        (EvaluationSpec, {"stage": {"kind": "sft"}}, "stage", "'stage' here. Available: name, model, with_base,"),
        (EvaluationSpec, {"generation": {"temprature": 1}}, "generation.temprature", "'generation.temperature'?"),
        (
            EvaluationSpec,
            {"model": {"quantization": {"kind": "8bit", "compute": 1}}},
            "model.quantization.compute",
            "There is no setting",
        ),
        (ExportSpec, {"extra": {}}, "extra", "'extra' here. Available: name, model, adapters,"),
        (
            ExportSpec,
            {"model": {"rope_scaling": {"kind": "none", "factor": 2}}},
            "model.rope_scaling.factor",
            "The rope_scaling none has no setting 'model.rope_scaling.factor'; it belongs to: linear, dynamic, yarn.",
        ),
        (GenerationSettings, {"name": 1}, "name", "'name' here. Available: temperature, top_p,"),
    ],
)
def test_a_key_is_looked_for_among_those_of_its_own_whole(whole: type[Part], given: Any, field: str, told: str) -> None:
    assert told in refused(given, whole)[field]


@pytest.mark.parametrize(("text", "line"), [("a: [1", 1), ("a: 1\n b: 2", 2), ("\tx: 1", 1), ("a: 1\n\nb: {", 3)])
def test_text_that_is_no_yaml_is_refused_with_line_and_column(text: str, line: int) -> None:
    with pytest.raises(Refusal) as caught:
        RunSpec.from_yaml(text)
    assert caught.value.problems[0].code == "spec-not-yaml"
    assert caught.value.problems[0].values["line"] >= line


LAUGHS = "a: &a [ha, ha]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (LAUGHS, "yaml-alias"),
        ("[" * 200_000, "yaml-too-deep"),
        ("a: &b 1\nc: *b", "yaml-alias"),
        ("#" * 300_000, "yaml-too-large"),
        ("a: " + "9" * 5000, "spec-not-yaml"),
        ("a: 0x" + "f" * 5000, "spec-not-yaml"),
        ("a: 1" + ":59" * 5000, "spec-not-yaml"),
        ("a: !!int ''", "spec-not-yaml"),
        ("a: !!float ''", "spec-not-yaml"),
        ("a: !!bool x", "spec-not-yaml"),
        ("a: !!timestamp x", "spec-not-yaml"),
        ("a: " + "1:" * 400 + "1.0", "spec-not-yaml"),
        ("2001-13-45", "spec-not-yaml"),
        ("data:\n  datasets: [" + ", ".join(f"d{number}" for number in range(1001)) + "]", "spec-too-many"),
        (
            "data:\n  eval_datasets: [" + ", ".join(f"d{number}" for number in range(1001)) + "]",
            "spec-too-many",
        ),
    ],
)
def test_yaml_that_grows_or_sinks_without_end_is_refused_at_once(text: str, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        RunSpec.from_yaml(text)
    assert caught.value.problems[0].code == code


def test_a_number_that_is_none_is_read_in_time_in_proportion_to_its_length() -> None:
    """Not quadratic: a regular expression that tries each digit as an end took minutes, and held up everybody."""
    text = "1" * 200_000 + "x"
    began = time.process_time()
    assert read_yaml(f"a: {text}") == {"a": text}
    assert write_yaml({"a": text}).startswith("a: 1")
    assert time.process_time() - began < 5  # it was some ten minutes


def test_numbers_are_read_as_people_write_them_and_texts_stay_texts() -> None:
    assert read_yaml("[1e-5, 2E+3, .5e1, 1.5e-08]") == [1e-5, 2000.0, 5.0, 1.5e-8]
    spec = RunSpec.read({"name": "1e5", "data": {"datasets": {"2e-1": 2, "true": 1}}})
    assert RunSpec.from_yaml(spec.to_yaml()) == spec


def test_values_that_are_one_object_are_written_out_twice() -> None:
    shared = {"min_lr": 1e-6}
    spec = RunSpec.read({"extra": {"lr_scheduler_kwargs": shared, "liger_kernel_config": shared}})
    assert RunSpec.from_yaml(spec.to_yaml()) == spec


def test_a_huge_wrong_value_is_named_in_a_few_words() -> None:
    grown: list[Any] = []
    for _ in range(40):
        grown = [grown] * 9
    assert len(refused({"name": grown})["name"]) < 200


@pytest.mark.parametrize("given", [[["x"]], [1], "x", [{}], [None]])
def test_data_sets_that_are_no_names_are_refused(given: Any) -> None:
    assert any(field.startswith("data.datasets") for field in refused({"data": {"datasets": given}}))


@pytest.mark.parametrize("text", ["", "- 1", "hello", "3", "null"])
def test_yaml_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="mapping"):
        RunSpec.from_yaml(text)


def test_yaml_cannot_make_python_objects() -> None:
    with pytest.raises(Refusal):
        RunSpec.from_yaml("!!python/object/apply:os.system ['true']")


def grpo(**changes: Any) -> dict[str, Any]:
    """A spec of GRPO whose 16 answers to a step are two groups."""
    return {"stage": {"kind": "grpo", "rewards": ["exact"]} | changes}


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"method": "full", "model": {"quantization": "4bit"}}, "quantized-needs-lora"),
        (
            {"method": {"kind": "lora", "init_lora_weights": "pissa"}, "model": {"quantization": "4bit"}},
            "quantized-svd-init",
        ),
        ({"logging": {"load_best_model_at_end": True}}, "needs-validation"),
        ({"logging": {"early_stopping_patience": 3}}, "needs-validation"),
        ({"data": {"datasets": ["a"], "eval_datasets": ["a"]}}, "validation-is-training"),
        ({"hardware": {"devices": [0, 0], "num_processes": 2}}, "cards-twice"),
        ({"hardware": {"devices": [0, 1], "num_processes": 1}}, "cards-count"),
        ({"hardware": {"device": "cpu"}, "training": {"precision": "fp16"}}, "fp16-on-cpu"),
        ({"extra": {"learning_rate": 1}}, "extra-has-a-field"),
        ({"extra": {"adam_beta3": 1}}, "extra-unknown"),
        ({"extra": {"hub_token": "hf_x"}}, "extra-has-a-field"),
        ({"extra": {"deepspeed": "/etc/passwd"}}, "extra-has-a-field"),
        ({"extra": {"fsdp_config": {}}}, "extra-has-a-field"),
        ({"extra": {"adam_beta2": "high"}}, "extra-type"),
        ({"extra": {"full_determinism": 1}}, "extra-type"),
        ({"extra": {"lr_scheduler_kwargs": "{}"}}, "extra-type"),
        ({"extra": {"adam_epsilon": float("nan")}}, "spec-type-finite"),
        ({"training": {"lr_scheduler_type": "greedy"}}, "needs-validation"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "schedule-needs"),
        ({"training": {"lr_scheduler_type": "warmup_stable_decay"}}, "schedule-needs"),
        ({"training": {"optim": "galore_adamw"}}, "optimizer-needs-targets"),
        ({"method": {"kind": "lora", "target_modules": []}}, "no-targets"),
        ({"method": "full", "model": {"adapter_path": "x"}}, "adapter-needs-lora"),
        (grpo(rewards={}), "rewards-not-chosen"),
        (grpo(rewards={"exact": 0}), "rewards-not-chosen"),
        (grpo(rewards=["format"]), "reward-needs"),
        (grpo(rewards=["length"]), "reward-needs"),
        (grpo(rewards=["reward_model"]), "reward-needs"),
        (grpo(rewards=["file"]), "reward-needs"),
        (grpo(rewards=["format"], reward_pattern="(a"), "pattern-broken"),
        (grpo(rewards=["length"], reward_length=300), "length-unreachable"),
        (grpo(num_generations=6), "group-does-not-divide"),
        (grpo(grpo_loss="cispo", epsilon_high=0.28), "cispo-clips-all"),
        (grpo(grpo_loss="luspo"), "luspo-needs-sequence"),
        (grpo() | {"extra": {"beta": 0.1}}, "extra-has-a-field"),
        (grpo() | {"extra": {"steps_per_generation": 2}}, "extra-has-a-field"),
        (grpo() | {"data": {"packing": True}}, "packing-not-here"),
    ],
)
def test_contradictions_are_found(given: dict[str, Any], code: str) -> None:
    assert code in {one.code for one in spec_problems(RunSpec.read(given))}


@pytest.mark.parametrize(
    ("training", "extra"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_kwargs": {"min_lr": 1e-6}}),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {"lr_scheduler_kwargs": {"num_decay_steps": 5}}),
        ({"optim": "apollo_adamw"}, {"optim_target_modules": ["q_proj"]}),
        ({}, {"adam_beta2": 0, "tf32": None, "optim_args": "a=1", "label_names": ["labels"]}),
    ],
)
def test_what_a_choice_needs_besides_is_enough(training: dict[str, Any], extra: dict[str, Any]) -> None:
    found = spec_problems(RunSpec.read({"training": training, "extra": extra}))
    assert {one.code for one in found} == {"model-not-chosen", "data-not-chosen"}


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "group", "nearest", "more"),
    [(2, 8, 1, 6, 4, 9), (2, 8, 1, 3, 2, 9), (1, 1, 1, 8, "—", 8), (3, 1, 2, 4, 3, 2), (7, 1, 1, 8, 7, 8)],
)
def test_a_group_that_does_not_divide_is_told_the_nearest_that_does(
    batch: int, accumulation: int, processes: int, group: int, nearest: Any, more: int
) -> None:
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    given = grpo(num_generations=group) | {"training": training, "hardware": {"num_processes": processes}}
    spec = RunSpec.read(given)
    (found,) = (one for one in spec_problems(spec) if one.code == "group-does-not-divide")
    assert (found.values["nearest"], found.values["accumulation"]) == (nearest, more)
    mended = [spec.change("training.gradient_accumulation_steps", more)]
    mended += [spec.change("stage.num_generations", nearest)] if nearest != "—" else []
    assert not [one for each in mended for one in spec_problems(each) if one.code == "group-does-not-divide"]


def test_a_reward_that_does_not_exist_is_a_problem_of_the_rewards() -> None:
    assert "formt" in refused(grpo(rewards={"formt": 1}))["stage.rewards"]
    assert RunSpec.read(grpo(rewards=["exact", "length"])).stage.rewards == {"exact": 1, "length": 1}


def test_an_argument_with_another_name_in_the_spec_is_told_that_name() -> None:
    told = {
        "beta": "stage.grpo_beta",
        "loss_type": "stage.grpo_loss",
        "max_completion_length": "stage.max_new_tokens",
    }
    spec = RunSpec.read(grpo() | {"extra": dict.fromkeys(told, 1)})
    found = {one.values["name"]: one.values["place"] for one in spec_problems(spec) if one.field == "extra"}
    assert found == told


def test_every_setting_has_a_label_a_help_and_is_declared_once() -> None:
    for path, info in fields().items():
        assert info.title, path
        assert info.description, path
    labels = [info.title for path, info in fields().items()]
    assert len(labels) == len(set(labels))


def test_the_schema_is_json_and_names_every_part() -> None:
    schema = json.loads(json.dumps(RunSpec.model_json_schema()))
    assert set(schema["properties"]) == set(RunSpec.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "processes", "epochs", "steps"),
    [
        (120, 16, 1, 1, 30, 240),
        (100, 2, 8, 1, 3, 21),
        (100, 2, 8, 4, 3, 6),
        (1, 4, 4, 1, 1, 1),
        (10, 4, 1, 1, 0.5, 2),
    ],
)
def test_optimizer_steps_are_counted_as_the_trainer_counts_them(
    rows: int, batch: int, accumulation: int, processes: int, epochs: float, steps: int
) -> None:
    spec = RunSpec.read(
        {
            "training": {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": epochs,
            },
            "hardware": {"num_processes": processes},
        }
    )
    assert optimizer_steps(spec, rows) == steps


def test_what_is_offered_is_all_that_the_library_has() -> None:
    """Schedulers, optimizers and further arguments are written down here, so that the page needs no torch."""
    ask = (
        "import json; from transformers.training_args import OptimizerNames; from transformers import SchedulerType;"
        "from engine.worker.training.trainer_arguments import arguments, schedules;"
        "print(json.dumps([[o.value for o in OptimizerNames], "
        "[s.value for s in SchedulerType], arguments(), schedules()]))"
    )
    optimizers, schedulers, arguments, schedules = json.loads(run_python("-c", ask))
    assert set(Optimizer.__args__) == set(optimizers)
    assert set(Scheduler.__args__) == set(schedulers)
    assert trainer_arguments() == arguments
    assert schedule_arguments() == schedules


def test_brief_yaml_has_only_what_differs_from_the_defaults() -> None:
    brief = yaml.safe_load(RunSpec.read({"training": {"seed": 7}}).to_yaml(brief=True))
    assert brief == {"stage": {"kind": "sft"}, "method": {"kind": "lora"}, "training": {"seed": 7}}
    assert math.isclose(RunSpec().training.learning_rate, 1e-4)
