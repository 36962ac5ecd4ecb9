"""How several processes divide a training: what excludes what, what "auto" chooses, and what each GPU then needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import SHAPES
from docs import memory_table
from docs import strategies as pages
from docs.memory_table import write_headers
from engine.core import hardware
from engine.core.problems import Problem, Refusal
from engine.core.rundir import RunDir
from engine.launch.accelerate_config import configuration, is_fsdp, is_hybrid, with_processes
from engine.launch.engine_choice import EngineChoice
from engine.launch.workspace import Workplace
from engine.models.facts import ModelFacts, inspect_model
from engine.preflight import checks, memory, memory_savers, package_checks
from engine.preflight.division import fsdp2_obstacles, machine_problems, model_problems
from engine.preflight.strategy import loading_warnings, strategy_reason, write_configuration
from engine.runs.plan import summary
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import SPEC_CHOICES, RunSpec
from engine.spec.setting_limits import Limit
from engine.spec.strategies import LIMITS, limit_problems
from engine.spec.yaml_text import read_yaml
from webui.form.settings import choices
from webui.train_tab import plan_html, strategy_html
from webui.train_tab.strategy_html import disabled_choices_css, excluded_choices
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

GIB = 2**30
# A choice that a limit excludes, where it is not one of a list.
EXCLUDED: dict[str, Any] = {
    "method.use_dora": True,
    "method.loraplus_lr_ratio": 16.0,
    "method.expert_r": 4,
    "method.modules_to_save": ["lm_head"],
    "model.add_tokens": ["<answer>"],
    "model.add_special_tokens": ["<answer>"],
    "model.resize_embeddings": True,
    "stage.reward_model": "saves/reward",
    "model.adapter_path": "saves/adapter",
    "logging.load_best_model_at_end": True,
    "hardware.num_machines": 2,
}


def spec(**changes: Any) -> RunSpec:
    """Two processes that divide a LoRA training with FSDP2."""
    plain: dict[str, Any] = {
        "model": {"model_name_or_path": "m"},
        "data": {"datasets": ["d"], "max_length": 2048},
        "hardware": {"num_processes": 2, "strategy": "fsdp2"},
    }
    result = RunSpec.read(plain)
    for path, value in changes.items():
        result = result.change(path.replace("__", "."), value)
    return result


SHARDING = "hardware.strategy.sharding"


def on_machines(run_spec: RunSpec, machines: int, processes: int, sharding: str) -> RunSpec:
    """The same training with FSDP2 on so many machines."""
    devices = {"num_processes": processes, "num_machines": machines}
    return run_spec.change("hardware", devices | {"strategy": {"kind": "fsdp2", "sharding": sharding}})


def problems_at(run_spec: RunSpec, field: str) -> list[str]:
    return [problem.code for problem in spec_problems(run_spec) if problem.field == field]


def excluded_values(limit: Limit) -> list[Any]:
    listed = [value for value in choices(limit.path) if value not in limit.allowed]
    return [*listed, EXCLUDED[limit.path]] if limit.path in EXCLUDED else listed


@pytest.mark.parametrize("strategy", LIMITS)
def test_what_a_strategy_excludes_is_a_problem_at_its_field(strategy: str) -> None:
    excluded = [(limit, value) for limit in LIMITS[strategy] for value in excluded_values(limit)]
    assert len({limit.path for limit, _ in excluded}) > 15
    for limit, value in excluded:
        run_spec = spec(hardware__strategy=strategy)
        run_spec = run_spec.change("stage", {"kind": limit.stages[0]}) if limit.stages else run_spec
        if limit.path.startswith("model.quantization."):
            run_spec = run_spec.change("model.quantization", {"kind": "4bit"})
        run_spec = run_spec.change(limit.path, {"kind": value} if limit.path in SPEC_CHOICES else value)
        assert "strategy-not-with" in problems_at(run_spec, limit.path), value
        assert "strategy-not-with" not in problems_at(run_spec.change("hardware.strategy", "ddp"), limit.path)


def test_a_strategy_needs_its_number_of_processes() -> None:
    assert problems_at(spec(hardware__strategy="single"), "hardware.strategy") == ["strategy-single"]
    for strategy in ("ddp", *LIMITS):
        run_spec = spec(hardware={"num_processes": 1, "strategy": strategy})
        assert problems_at(run_spec, "hardware.num_processes") == ["strategy-needs-processes"]
    assert not problems_at(spec(hardware={"num_processes": 1}), "hardware.num_processes")
    assert problems_at(spec(extra={"use_liger_kernel": True}), "extra.use_liger_kernel") == ["strategy-not-with-extra"]


@pytest.mark.parametrize(("machines", "processes"), [(1, 4), (2, 2), (3, 3)])
def test_copies_on_machines_need_machines_with_several_processes(machines: int, processes: int) -> None:
    run_spec = on_machines(spec(), machines, processes, "hybrid")
    assert problems_at(run_spec, "hardware.strategy.sharding") == ["hybrid-needs-machines"]
    assert not problems_at(on_machines(spec(), machines, processes, "auto"), SHARDING)
    assert not problems_at(on_machines(spec(), 2, 4, "hybrid"), SHARDING)
    assert (SHARDING, "hybrid") in set(excluded_choices(on_machines(spec(), machines, processes, "full")))


@pytest.mark.parametrize("sharding", ["", "everywhere", "hybrid</option><script>alert(1)</script>", None, True])
def test_another_sharding_is_refused_at_its_field(sharding: Any) -> None:
    with pytest.raises(Refusal) as refused:
        spec(hardware__strategy={"kind": "fsdp2", "sharding": sharding})
    assert [problem.field for problem in refused.value.problems] == [SHARDING]


def test_the_form_greys_out_what_cannot_be_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 2, 80)
    run_spec = spec()
    greyed = set(excluded_choices(run_spec))
    assert ("stage", "ppo") in greyed
    assert ("model.quantization", "8bit") in greyed
    assert ("training.optim", "adafactor") in greyed
    assert ("hardware.strategy", "single") in greyed
    assert not any(path == "stage" and value in ("sft", "dpo") for path, value in greyed)
    assert (SHARDING, "hybrid") in greyed
    for path, value in greyed - {("hardware.strategy", "single"), (SHARDING, "hybrid")}:
        changed = run_spec.change(path, {"kind": value} if path in SPEC_CHOICES else value)
        assert "strategy-not-with" in problems_at(changed, path)
    assert ("hardware.strategy", "fsdp2") in set(excluded_choices(spec(hardware={"num_processes": 1})))
    ddp = spec(hardware__strategy="ddp")
    assert set(excluded_choices(ddp)) == {("hardware.strategy", "single")}
    zero = spec(hardware__strategy="zero2")
    assert {("stage", "kto"), ("model.quantization", "4bit"), ("method", "freeze")} <= set(excluded_choices(zero))
    monkeypatch.setattr(strategy_html, "deepspeed_installed", lambda: False)
    assert 'input[value="zero3"]' in strategy_html.hidden_choices_css(ddp)
    assert strategy_html.hidden_choices_css(zero) == ""  # its mark must be seen
    monkeypatch.setattr(strategy_html, "deepspeed_installed", lambda: True)
    assert strategy_html.hidden_choices_css(ddp) == ""
    for change in ({"stage": {"kind": "ppo", "reward_model": "r"}}, {"hardware__device": "cpu"}):
        excluding = spec(hardware__strategy="ddp", **change)
        assert ("hardware.strategy", "fsdp2") in set(excluded_choices(excluding))
    assert 'label:has(input[value="ppo"])' in disabled_choices_css(run_spec, Words("zh"))


@pytest.mark.parametrize("name", ["strategies.md", "strategies_zh.md"])
def test_the_page_has_the_table_of_the_program(name: str) -> None:
    text = (Path(pages.__file__).parent / name).read_text(encoding="utf-8")
    assert text == pages.pages()[name]
    assert all(f"| `{limit.path}` |" in text for limits in LIMITS.values() for limit in limits)


# ------------------------------------------------------------------------------------------ memory, and the choice


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 7 billion parameters of which only the headers are there."""
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return write_headers(tmp_path_factory.mktemp("shapes") / "7B", config | dict(SHAPES["7B"]))


def cards(monkeypatch: pytest.MonkeyPatch, count: int, gib: int) -> None:
    gpus = tuple(hardware.Gpu(n, f"GPU-{n}", "NVIDIA H100", gib * GIB, gib * GIB, 9.0) for n in range(count))
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)


def full(model: Path, processes: int, strategy: Any = "auto", **changes: Any) -> RunSpec:
    devices = {"num_processes": processes, "strategy": strategy}
    small = {"training__per_device_train_batch_size": 1, "model__model_name_or_path": str(model)}
    return spec(**small, method={"kind": "full"}, hardware=devices, **changes)


def needed(run_spec: RunSpec) -> memory.MemoryNeed:
    model = inspect_model(run_spec.model.model_name_or_path)
    need = memory.memory_needed(run_spec, model, run_spec.hardware.num_processes)
    assert need
    return need


def test_more_gpus_need_less_memory_each_with_fsdp2_and_not_with_ddp(seven: Path) -> None:
    parameters = inspect_model(seven).parameters
    ddp = {count: needed(full(seven, count, "ddp")) for count in (2, 8)}
    fsdp2 = {count: needed(full(seven, count, "fsdp2")) for count in (2, 8)}
    assert ddp[2] == ddp[8]
    # Weights, gradients and two moments, in fp32, of an eighth of the parameters; and what is gathered at a time.
    for count, need in fsdp2.items():
        rest = need.weights + need.learning - 16 * parameters / count
        assert 0 < rest < 2 * parameters  # less than the whole model in half precision
    assert needed(full(seven, 8, {"kind": "fsdp2", "reshard_after_forward": False})).total > fsdp2[8].total + 10 * GIB
    assert needed(full(seven, 8, {"kind": "fsdp2", "cpu_offload": True})).total < fsdp2[8].total - 10 * GIB
    quantized = full(seven, 8, "fsdp2").change("method", "lora").change("model.quantization", {"kind": "4bit"})
    assert needed(quantized).total > 0.5 * parameters  # which each GPU loads as a whole


@pytest.mark.parametrize(
    ("gib", "count", "changes", "strategy", "code"),
    [
        (160, 8, {}, "ddp", "strategy-fits"),
        (80, 8, {}, "fsdp2", "strategy-divided"),
        (80, 1, {}, "single", "strategy-one-process"),
        (80, 8, {"training__optim": "adafactor", "data__max_length": 100_000}, "ddp", "strategy-excluded"),
        (80, 8, {"hardware__device": "cpu"}, "ddp", "strategy-on-cpu"),
        (0, 8, {}, "ddp", "strategy-without-estimate"),
    ],
)
def test_auto_divides_only_what_does_not_fit_and_says_why(
    seven: Path, monkeypatch: pytest.MonkeyPatch, gib: int, count: int, changes: dict[str, Any], strategy: str,
    code: str,
) -> None:  # fmt: skip
    cards(monkeypatch, 8, gib)
    run_spec, model = full(seven, count, **changes), inspect_model(seven)
    assert memory.with_strategy(run_spec, model, 8).hardware.strategy.kind == strategy
    reason = strategy_reason(run_spec, model, 8)
    assert reason.code == code
    assert reason.text() != reason.text("zh")


def test_what_only_the_machines_of_a_cluster_can_decide_is_not_said_before(seven: Path) -> None:
    model, run_spec = inspect_model(seven), full(seven, 16).change("hardware.num_machines", 2)
    hardware.plan_for(EngineChoice(engine="slurm", gpus_per_machine=8).node)
    try:
        assert strategy_reason(run_spec, model, 8).code == "strategy-decided-there"
        chosen = strategy_reason(on_machines(run_spec, 2, 16, "auto"), model, 8)
        assert (chosen.code, "is decided when the run starts there" in chosen.text()) == ("strategy-as-set", True)
        assert "由所在机器决定" in chosen.text("zh")
    finally:
        hardware.plan_for(None)


@pytest.mark.parametrize(
    ("gib", "machines", "sharding", "copies", "explanation"),
    [
        (80, 2, "auto", 2, "Each of the 2 machines has a copy of the model, divided among its 8 GPUs (HSDP)"),
        (20, 2, "auto", 1, "with a copy on each machine (HSDP), the run would need about"),
        (20, 2, "hybrid", 2, "Each of the 2 machines has a copy"),
        (80, 2, "full", 1, "among the GPUs of all machines, as set."),
        (80, 16, "auto", 1, "since each of them uses a single GPU."),
        (0, 2, "auto", 1, "it is not known whether a copy on each machine (HSDP) would fit."),
        (80, 1, "auto", 1, "Strategy: FSDP2, as set."),
    ],
)
def test_several_machines_have_copies_where_these_fit(
    seven: Path, monkeypatch: pytest.MonkeyPatch, gib: int, machines: int, sharding: str, copies: int, explanation: str
) -> None:
    cards(monkeypatch, 8, gib)
    run_spec, model = on_machines(full(seven, 16), machines, 16, sharding), inspect_model(seven)
    chosen = memory.with_strategy(run_spec, model, 8).hardware
    assert (chosen.strategy.kind, chosen.copies) == ("fsdp2", copies)
    reason = strategy_reason(run_spec, model, 8)
    assert reason.code == "strategy-as-set"
    assert explanation in reason.text()
    assert reason.text() != reason.text("zh")
    alone = on_machines(run_spec, 1, 16 // copies, "full")
    assert needed(run_spec) == needed(alone)
    plain = read_yaml(configuration(chosen, reason.text()))
    assert plain.get("parallelism_config", {}).get("parallelism_config_dp_replicate_size", 1) == copies


def test_copies_are_chosen_and_explained_without_being_asked_for(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 8, 80)
    run_spec = full(seven, 16).change("hardware.num_machines", 2)
    reason = strategy_reason(run_spec, inspect_model(seven), 8)
    assert (reason.code, "(HSDP)" in reason.text()) == ("strategy-divided", True)
    model, hybrid = inspect_model(seven), on_machines(full(seven, 16), 2, 16, "hybrid")
    room = needed(on_machines(full(seven, 16), 1, 16, "full")).total + 1
    fitted = memory_savers.fit_to_memory(hybrid, model, 8, room)
    assert fitted == hybrid.change(SHARDING, "full")
    text = configuration(hybrid.hardware, "why\nwarum")
    for machines, processes, copies in ((2, 16, 2), (2, 4, 2), (2, 2, 1), (4, 16, 4), (1, 8, 1)):
        changed = with_processes(text, processes, machines)
        assert changed.startswith("# why\n# warum\n")
        assert read_yaml(changed)["num_processes"] == processes
        plain = read_yaml(changed).get("parallelism_config", {})
        assert plain.get("parallelism_config_dp_replicate_size", 1) == copies
        assert is_hybrid(changed) == (copies > 1)
    assert with_processes(text, 16, 2) == text
    assert not is_hybrid(with_processes(configuration(on_machines(hybrid, 2, 16, "full").hardware, ""), 16, 4))


def test_the_configuration_is_in_the_runs_folder_and_stays_once_there_is_a_checkpoint(
    seven: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards(monkeypatch, 8, 80)
    run, run_spec = RunDir(tmp_path), full(seven, 8)

    def written() -> str:
        write_configuration(run_spec, tmp_path, 8)
        return run.accelerate.read_text(encoding="utf-8")

    text = written()
    assert is_fsdp(text)
    assert text.startswith("# Strategy: FSDP2. With DDP, the run would need about ")
    plain = read_yaml(text)
    assert (plain["num_processes"], plain["fsdp_config"]["fsdp_version"]) == (8, 2)
    cards(monkeypatch, 8, 160)
    assert not is_fsdp(written())
    cards(monkeypatch, 8, 80)
    assert written() == text
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "complete.json").write_text("{}", encoding="utf-8")
    cards(monkeypatch, 8, 160)  # a resumed run continues as it began
    assert written() == text
    run.accelerate.unlink()
    cards(monkeypatch, 8, 80)  # a run of a version without strategies has trained with DDP
    assert not is_fsdp(written())


def test_a_model_from_a_hub_is_estimated_once_it_is_there(
    seven: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards(monkeypatch, 8, 80)
    run, run_spec = RunDir(tmp_path), full(Path("somebody/7B"), 8)
    write_configuration(run_spec, tmp_path, 8)
    assert "cannot be estimated yet" in run.accelerate.read_text(encoding="utf-8")
    run.prepared.mkdir()
    (run.prepared / "summary.json").write_text(json.dumps({"model_path": str(seven)}), encoding="utf-8")
    write_configuration(run_spec, tmp_path, 8)
    assert is_fsdp(run.accelerate.read_text(encoding="utf-8"))


def test_what_does_not_fit_with_ddp_is_fitted_by_fsdp2(seven: Path) -> None:
    run_spec = full(seven, 8, "ddp", training__optim="adamw_torch")
    fits = memory_savers.fit_to_memory(run_spec, inspect_model(seven), 8, 80 * GIB)
    assert fits
    assert fits.hardware.strategy.kind == "fsdp2"
    assert fits.training == run_spec.training
    excluded = full(seven, 8, "ddp", training__optim="adafactor", data__max_length=100_000)
    other = memory_savers.fit_to_memory(excluded, inspect_model(seven), 8, 80 * GIB)
    assert other is None or other.hardware.strategy.kind == "ddp"


def test_the_plan_says_which_strategy_and_why(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, workplace: Workplace
) -> None:
    cards(monkeypatch, 8, 80)
    run_spec = make_spec(hardware={"num_processes": 8})
    plan = summary(run_spec, workplace)
    assert plan.strategy
    assert plan.strategy.code == "strategy-fits"
    assert "Strategy: DDP" in plan_html.plan(run_spec, plan, [], Words("en"), known=True)
    assert summary(make_spec(hardware={"num_processes": 1}), workplace).strategy is None


def on_this_machine(run_spec: RunSpec) -> list[Problem]:
    return checks.device_problems(run_spec)


def test_without_gpus_there_is_nothing_to_divide(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", tuple)
    assert [problem.code for problem in on_this_machine(full(seven, 2, "fsdp2"))] == ["strategy-needs-gpus"]
    assert on_this_machine(full(seven, 2, "ddp")) == []


def test_what_fsdp2_cannot_divide_of_a_model_or_on_a_machine_is_said(
    seven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: ModelFacts = inspect_model(seven)
    values: Mapping[str, Any] = vars(model) | {"quantized": "fp8"}
    assert model_problems(full(seven, 2, "fsdp2"), model, "fsdp2") == []
    stored = model_problems(full(seven, 2, "fsdp2"), ModelFacts(**values), "fsdp2")
    assert [problem.code for problem in stored] == ["stored-weights-undivided"]
    seeing = ModelFacts(**(vars(model) | {"has_towers": True}))
    assert [problem.code for problem in fsdp2_obstacles(full(seven, 2), seeing)] == ["fsdp2-towers"]
    run_spec = full(seven, 2, "fsdp2")
    assert machine_problems(run_spec, "fsdp2") == []
    old = hardware.Gpu(0, "GPU-0", "Tesla T4", 16 * GIB, 16 * GIB, 7.5)
    monkeypatch.setattr(hardware, "gpus", lambda: (old, old))
    assert [problem.field for problem in machine_problems(run_spec, "fsdp2")] == ["training.precision"]
    assert machine_problems(run_spec.change("training.precision", "fp32"), "fsdp2") == []


def test_deepspeed_needs_its_package_and_says_what_it_cannot_divide(
    seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_spec = full(seven, 8, "zero3", training__optim="adafactor")
    [wrong] = limit_problems(run_spec, "zero3")
    assert "look at their shapes would do something else. Possible: adamw_torch" in wrong.text()
    assert "ZeRO-3 策略不支持“adafactor”：" in wrong.text("zh")
    assert ("zero3", "deepspeed", "hardware.strategy") in package_checks.required_packages(run_spec)
    monkeypatch.setattr(package_checks, "DEEPSPEED", "deepspeed_that_is_not_installed")
    assert not package_checks.deepspeed_installed()
    [missing] = package_checks.package_problems(run_spec.change("training.optim", "adamw_torch"), wait=False)
    assert (missing.code, missing.field) == ("deepspeed-missing", "hardware.strategy")
    assert missing.text().startswith("'ZeRO-3' needs DeepSpeed, which is not installed here. Choose FSDP2, or run")
    experts = write_headers(tmp_path / "experts", memory_table.SHAPES["Qwen3-30B-A3B"])
    codes = [problem.code for problem in model_problems(run_spec, inspect_model(experts), "zero3")]
    assert codes == ["zero-experts"]


def test_zero_divides_what_is_trained_and_in_stage_three_the_weights(seven: Path) -> None:
    parameters = inspect_model(seven).parameters
    ddp, fsdp2 = needed(full(seven, 8, "ddp")), needed(full(seven, 8, "fsdp2"))
    zero2, zero3 = needed(full(seven, 8, "zero2")), needed(full(seven, 8, "zero3"))
    assert zero2.weights == ddp.weights
    # A copy in fp32, gradients and two moments of an eighth, and the gradients that are exchanged at a time.
    assert zero2.learning == pytest.approx(16 * parameters / 8 + 4 * memory.ZERO_BUCKET)
    assert ddp.total > zero2.total > zero3.total > fsdp2.total
    assert needed(full(seven, 8, {"kind": "zero2", "cpu_offload": True})).total < zero2.total - 10 * GIB
    # The whole model is on each GPU before it is divided.
    assert needed(full(seven, 8, {"kind": "zero3", "cpu_offload": True})).total > 4 * parameters


def test_copies_that_may_not_fit_into_main_memory_while_loading_are_a_warning(
    seven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, 8, 80)
    for total, codes in ((256, []), (200, ["fsdp2-main-memory"])):  # 8 × 30.9 GB, in fp32
        monkeypatch.setattr(hardware, "memory", lambda total=total: (total * 10**9, total * 10**9))
        warnings = loading_warnings(full(seven, 8, "fsdp2"), inspect_model(seven))
        assert [warning.code for warning in warnings] == codes
        assert loading_warnings(full(seven, 8, "ddp"), inspect_model(seven)) == []
