"""Numbers that cannot be, or that this machine cannot hold, are told before the start with the largest that can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.core import hardware
from engine.core.problems import Problem, Refusal, say
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.models.facts import inspect_model
from engine.models.structure import structure_of
from engine.preflight import limits, memory, model_checks
from engine.runs import kinds
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from engine.spec.steps import optimizer_steps
from engine.worker.data.splits import repetitions, validation_rows
from tests.conftest import engine
from webui.form import reading, writing

pytestmark = pytest.mark.usefixtures("forked")

Checked = tuple[list[Problem], list[Problem]]


@pytest.fixture
def check(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Checked]:
    """(what keeps it from starting, what is told beside it) on a machine of 24 GB and two cores, without a card."""
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    monkeypatch.setattr(hardware, "memory", lambda: (24 << 30, 24 << 30))
    monkeypatch.setattr(hardware, "threads", lambda: 2)

    def checked(**changes: Any) -> Checked:
        kind = kinds.KINDS["training"]
        spec = kind.frozen(make_spec(**changes), workplace)
        found = kind.problems(spec, workplace)
        doubts = kind.doubts(spec, found)
        for one in (*found, *doubts):
            assert one.text("en") != one.text("zh")
        return found, doubts

    return checked


def codes(found: list[Problem]) -> list[tuple[str, str]]:
    return [(one.field, one.code) for one in found]


def test_nothing_is_said_of_a_plain_run(check: Callable[..., Checked]) -> None:
    assert check() == ([], [])


@pytest.mark.parametrize(
    ("changes", "field", "code", "largest"),
    [
        (
            {"hardware": {"device": "cpu", "num_processes": 1024}},
            "hardware.num_processes",
            "processes-beyond-memory",
            35,
        ),
        ({"data__preprocessing_num_workers": 256}, "data.preprocessing_num_workers", "workers-beyond-memory", 2),
        (
            {"data__validation_share": 0.5, "data__max_samples": 1},
            "data.validation_share",
            "validation-takes-all",
            None,
        ),
        ({"data__datasets": {"chat": 0.001}}, "data.datasets", "weights-leave-nothing", None),
        (
            {"training__warmup_steps": 9, "training__max_steps": None, "training__num_train_epochs": 0.5},
            "training.warmup_steps",
            "warmup-too-long",
            None,
        ),
        ({"training__warmup_steps": 8}, "training.warmup_steps", "warmup-too-long", None),
        (
            {"data__validation_share": 0.1, "logging__early_stopping_patience": 2},
            "logging.eval_steps",
            "validation-never",
            None,
        ),
        (
            {"logging__save_total_limit": None, "logging__save_steps": 1, "training__max_steps": 10**9},
            "logging.save_total_limit",
            "checkpoints-beyond-disk",
            None,
        ),
        (
            {"extra": {"dataloader_drop_last": True}, "training__per_device_train_batch_size": 64},
            "training.per_device_train_batch_size",
            "last-batch-dropped",
            40,
        ),
        ({"extra": {"adam_beta1": 1.5}}, "extra", "extra-limit", None),
        ({"extra": {"eval_on_start": True}}, "extra.eval_on_start", "needs-validation", None),
        ({"extra": {"ddp_backend": "smoke"}}, "extra.ddp_backend", "spec-choice", None),
        ({"extra": {"tf32": True}}, "extra", "tf32-needs-card", None),
        (
            {"model__attn_implementation": "flex_attention"},
            "model.attn_implementation",
            "attention-not-trained-on-cpu",
            None,
        ),
        (
            {"model__attn_implementation": "flash_attention_2"},  # there is no need to install anything
            "model.attn_implementation",
            "attention-needs-card",
            None,
        ),
        ({"method__r": 4096, "method__init_lora_weights": "pissa"}, "method.r", "rank-beyond-matrix", 32),
    ],
)
def test_what_cannot_be_keeps_a_run_from_starting(
    check: Callable[..., Checked], changes: dict[str, Any], field: str, code: str, largest: int | None
) -> None:
    (found, *others), _ = check(**changes)
    assert (found.field, found.code, others) == (field, code, [])
    if largest is not None:
        assert found.values["largest"] == largest
        parts = {field: largest} if field != "hardware.num_processes" else {"hardware__num_processes": largest}
        assert code not in {
            one.code for one in check(**{**changes, **{k.replace(".", "__"): v for k, v in parts.items()}})[0]
        }


@pytest.mark.parametrize(
    ("changes", "field", "code", "largest"),
    [
        (
            {"training__per_device_train_batch_size": 65536},
            "training.per_device_train_batch_size",
            "batch-beyond-rows",
            40,
        ),
        (
            {"training__gradient_accumulation_steps": 65536},
            "training.gradient_accumulation_steps",
            "step-beyond-rows",
            10,
        ),
        ({"data__preprocessing_num_workers": 8}, "data.preprocessing_num_workers", "more-workers-than-cores", None),
        ({"extra": {"dataloader_num_workers": 512}}, "extra.dataloader_num_workers", "more-workers-than-cores", None),
        ({"hardware__num_processes": 4}, "hardware.num_processes", "more-processes-than-cores", None),
        (
            {"training__lr_scheduler_type": "constant", "training__warmup_steps": 2},
            "training.warmup_steps",
            "warmup-not-here",
            None,
        ),
        (
            {"data__validation_share": 0.01, "logging__eval_steps": 2},
            "data.validation_share",
            "validation-of-few",
            None,
        ),
        ({"data__validation_share": 0.1}, "logging.eval_steps", "validation-after-end", None),
        (
            {"data__validation_share": 0.1, "logging__eval_steps": 4, "logging__early_stopping_patience": 2},
            "logging.early_stopping_patience",
            "stopping-never",
            None,
        ),
        ({"method__r": 128}, "method.r", "rank-beyond-width", None),
    ],
)
def test_what_does_not_do_what_is_expected_is_told_and_can_start(
    check: Callable[..., Checked], changes: dict[str, Any], field: str, code: str, largest: int | None
) -> None:
    found, doubts = check(**changes)
    assert found == []
    assert (field, code) in codes(doubts)
    if largest is not None:
        assert next(one for one in doubts if one.code == code).values["largest"] == largest


def test_layers_that_share_a_weight_are_told_as_not_mergeable(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (f"model.layers.{number}.self_attn.q_proj" for number in range(2))
    monkeypatch.setattr(limits, "structure_of", lambda model: replace(structure_of(model), sharing=((first, second),)))
    code = ("method.target_modules", "adapter-not-mergeable")
    assert code in codes(limits.limit_warnings(make_spec(), []))
    assert code not in codes(limits.limit_warnings(make_spec(method__target_modules=["v_proj"]), []))
    assert code not in codes(limits.limit_warnings(make_spec(method="full"), []))


def test_a_model_without_recomputation_is_refused_with_it(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ("training.gradient_checkpointing", "checkpointing-unsupported")
    for recomputes, checkpointing, refused in ((True, True, False), (False, True, True), (False, False, False)):
        changed = replace(structure_of(inspect_model(DEMO_MODEL)), recomputes=recomputes)
        monkeypatch.setattr(model_checks, "structure_of", lambda _, changed=changed: changed)
        spec = make_spec(training__gradient_checkpointing=checkpointing)
        problems = model_checks.model_setting_problems(spec, inspect_model(spec.model.model_name_or_path))
        assert (code in codes(problems)) is refused


def test_memory_of_a_trained_tower_is_said_to_be_left_out_if_it_is_not_known(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "image_bytes", lambda *_, **__: None)
    for tower, expected in (("frozen", False), ("trained", True)):
        doubts = limits.limit_warnings(make_spec(vision__tower=tower), [])
        assert (("vision.tower", "memory-without-tower") in codes(doubts)) is expected


def test_a_batch_beyond_the_memory_is_told_with_the_largest_that_fits(
    check: Callable[..., Checked],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"instruction": f"{n}?", "output": f"{n}."} for n in range(70_000)]
    (workplace.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    path, needed = "training.per_device_train_batch_size", memory.memory_needed
    monkeypatch.setattr(hardware, "memory", lambda: (2 << 30, 2 << 30))
    estimated: list[RunSpec] = []
    with monkeypatch.context() as patch:
        patch.setattr(memory, "memory_needed", lambda spec, *others: estimated.append(spec) or needed(spec, *others))
        (found,), _ = check(training__per_device_train_batch_size=65536, data__max_length=512)
    assert 16 < len(estimated) < 100  # two bisections, and what else asks; not each of the sizes
    assert (found.field, found.code) == (path, "batch-beyond-memory")
    # By another way than bisection: the largest fits, one more does not.
    largest = found.values["largest"]
    spec, model, room = make_spec(data__max_length=16), inspect_model(workplace.models[0] / "tiny"), 2 << 30
    assert memory.memory_needed(spec.change(path, largest), model, 0).total <= room
    assert memory.memory_needed(spec.change(path, largest + 1), model, 0).total > room
    # Where only long rows would not fit it is an estimate, and keeps nobody from starting.
    found, doubts = check(training__per_device_train_batch_size=1024, data__max_length=512)
    assert (codes(found), (path, "batch-may-not-fit") in codes(doubts)) == ([], True)


def test_a_model_or_a_length_that_may_not_fit_is_told(
    check: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: (706 << 20, 706 << 20))
    _, doubts = check(training__per_device_train_batch_size=1, data__max_length=512)
    assert ("data.max_length", "length-may-not-fit") in codes(doubts)
    monkeypatch.setattr(hardware, "memory", lambda: (300 << 20, 300 << 20))
    assert ("model.model_name_or_path", "model-may-not-fit") in codes(check()[1])


@pytest.mark.parametrize(
    ("share", "weight", "samples"),
    [(0, 1, None), (0.1, 1, None), (0.33, 2.5, 7), (0.5, 0.3, 3), (0.01, 1, 2), (0, 0.5, 1)],
)
def test_rows_are_counted_as_preparation_splits_them(
    workplace: Workplace, make_spec: Callable[..., RunSpec], share: float, weight: float, samples: int | None
) -> None:
    spec = workplace.frozen(
        make_spec(data__validation_share=share, data__datasets={"chat": weight}, data__max_samples=samples)
    )
    counted = limits.row_counts(spec)
    there = samples or 40
    aside = validation_rows(there, max(round(there * share), 1) if share else 0, 42)
    assert (counted.total, counted.measured) == (int(repetitions(~aside, weight, 42).sum()), int(aside.sum()))


def test_grpo_needs_questions_for_one_step(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    stage = {"kind": "grpo", "rewards": ["exact"], "num_generations": 2, "max_new_tokens": 8}
    spec = make_spec(stage=stage, training__gradient_accumulation_steps=1, training__max_steps=None)
    few = workplace.frozen(spec.change("training.per_device_train_batch_size", 128))
    assert codes(limits.limit_problems(few, workplace, [])) == [("data.datasets", "fewer-questions-than-step")]
    assert optimizer_steps(few, 40) == 0
    assert limits.limit_problems(workplace.frozen(spec), workplace, []) == []


# ------------------------------------------------------------------------------------------ texts that are none


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "a\0b"])
@pytest.mark.parametrize(
    "field",
    [
        "name",
        "model.model_name_or_path",
        "data.dataset_dir",
        "data.datasets",
        "extra",
        "method.target_modules",
    ],
)
def test_half_a_character_or_nul_is_refused_at_its_field_in_words_that_can_be_written(field: str, text: str) -> None:
    values = {"data.datasets": {text: 1.0}, "extra": {"a": [{"b": text}]}, "method.target_modules": [text]}
    with pytest.raises(Refusal) as refused:
        RunSpec().change(field, values.get(field, text))
    for one in refused.value.problems:
        assert one.field.startswith(field)
        assert one.code == "spec-unwritable"
        for language in ("en", "zh"):
            said = one.text(language)
            assert said.encode()
            assert "\0" not in said
            assert re.search(r"\\(?:ud800|udfff|x00)", said)


def test_the_form_says_so_too(tiny: Any) -> None:
    values = writing.control_values(RunSpec()) | {"name": "a\ud800b"}
    _, found = reading.read(values)
    assert [(one.field, one.code) for one in found] == [("name", "spec-unwritable")]


def test_every_sentence_can_be_written_whatever_it_names() -> None:
    assert say("run-unknown", id="\udcff\0").encode()


def test_a_shell_says_it_and_a_path_that_is_no_text_is_told(workplace: Workplace) -> None:
    told = engine(workplace, "check", "-", input='name: "a\\ud800b"\n')
    assert (told.returncode, "Traceback" in told.stderr) == (2, False)
    told = engine(workplace, "show", "\udcffb")
    assert (told.returncode, "Traceback" in told.stderr) == (2, False)
    assert "\\udcff" in told.stderr


# ------------------------------------------------------------------------------------------ where it is told


def test_check_tells_doubts_beside_its_answer(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    spec = make_spec(training__per_device_train_batch_size=65536).to_yaml()
    checked = engine(workplace, "check", "-", input=spec)
    assert (checked.returncode, checked.stdout) == (0, "ready to start\n")
    assert "note: training.per_device_train_batch_size: " in checked.stderr
    spec = make_spec(data__preprocessing_num_workers=256, data__validation_share=0.5, data__max_samples=1).to_yaml()
    checked = engine(workplace, "check", "-", input=spec)
    assert checked.returncode == 1
    assert "data.validation_share: " in checked.stdout


def test_what_stops_a_run_comes_before_settings_that_do_not_exist(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(data__datasets={"nonesuch": 1}, extra={"epochs": 3}, training__per_device_train_batch_size=65536)
    checked = engine(workplace, "check", "-", input="foo: 1\n" + spec.to_yaml())
    first, second, third = checked.stdout.splitlines()
    assert (checked.returncode, first.split(":")[0]) == (1, "data.datasets")
    assert "no argument 'epochs'" in second
    assert "no setting 'foo'" in third


def test_a_wrong_value_comes_before_however_many_settings_do_not_exist() -> None:
    unknown = "".join(f"  x{number}: 1\n" for number in range(60))
    with pytest.raises(Refusal) as refused:
        kinds.read_known(f"data:\n{unknown}training:\n  learning_rate: fast\n")
    first, *others = refused.value.problems
    assert (first.field, others[-1].code) == ("training.learning_rate", "spec-more-problems")
    spec, unknown_keys = kinds.read_known("method: {kind: full, r: 8}\ntraining: {seed: 7, epochs: 2}\n")
    assert isinstance(spec, RunSpec)
    assert (spec.method.kind, spec.training.seed) == ("full", 7)
    assert {wrong.field for wrong in unknown_keys} == {"method.r", "training.epochs"}


def test_the_plan_of_the_page_has_both(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    plan = summary(make_spec(data__validation_share=0.5, data__max_samples=1), workplace)
    assert codes(plan.problems) == [("data.validation_share", "validation-takes-all")]
    plan = summary(make_spec(training__per_device_train_batch_size=65536), workplace)
    assert (plan.problems, codes(plan.doubts)) == (
        [],
        [("training.per_device_train_batch_size", "batch-beyond-rows")],
    )


def test_what_a_workplace_elsewhere_would_be_asked_is_not_asked(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    elsewhere = replace(workplace, data=workplace.saves)
    plan = summary(make_spec(), elsewhere)
    assert {one.field for one in plan.problems} == {"data.dataset_dir"}
