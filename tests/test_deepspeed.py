"""DeepSpeed's ZeRO, where it is installed (`make test-deepspeed`): what it learns is what one process learns.

Two real processes on the CPU (gloo), as in `test_sharding`; accelerate starts DeepSpeed on GPUs only, so a variable of
the tests lets it do so here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import zeros
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from transformers import TrainerControl, TrainerState

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, read_lines, write_text
from engine.launch import command
from engine.launch.accelerate_config import configuration
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.runs import failures, resumption
from engine.runs import runs as submitted
from engine.spec.run_spec import RunSpec
from engine.worker.training.zero import ZeroCheck
from tests.conftest import environment_of, short_training, wait_until
from tests.test_sharding import FULL, copied, cut_back, divided, learned, logged, together, with_own_head, write_data
from tests.train_many import lay_out, train_many

missing = importlib.util.find_spec("deepspeed") is None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing, reason="DeepSpeed is not installed: make test-deepspeed")]

ACCUMULATED = {"training__gradient_accumulation_steps": 2}
RECOMPUTED = {"training__gradient_checkpointing": True}
SCHEDULED = {"training__lr_scheduler_type": "cosine", "training__warmup_steps": 1, "training__weight_decay": 0.1}
PAIRS = {"stage": {"kind": "dpo"}, "data__datasets": ["pairs"]}
COMPARED: dict[str, dict[str, Any]] = {
    "full": FULL | ACCUMULATED | RECOMPUTED | SCHEDULED | {"training__max_grad_norm": 0.5},
    "lora": ACCUMULATED | RECOMPUTED,
    "packed": {"stage": {"kind": "pt"}, "data__datasets": ["text"], "data__packing": True, "training__optim": "sgd"},
    "dpo": PAIRS,
    "dpo, full": FULL | PAIRS,
    "bf16": FULL | {"training__precision": "bf16"},
    "lora in bf16": {"training__precision": "bf16"},
}
STRATEGIES = {
    "zero2": {"kind": "zero2"},
    "zero3": {"kind": "zero3"},
    "zero2, offload": {"kind": "zero2", "cpu_offload": True},
    "zero3, offload": {"kind": "zero3", "cpu_offload": True},
}


OFFLOADED = ("full", "lora")
CASES = [(name, label) for name in COMPARED for label in STRATEGIES if name in OFFLOADED or "offload" not in label]


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, RunDir]]:
    """Name of a training → "single", or of a strategy → its run, after it has ended."""
    folder = tmp_path_factory.mktemp("deepspeed")
    data, untied = write_data(folder / "data"), with_own_head(tiny, folder / "untied")
    common = {"training__max_steps": 3, "data__group_by_length": False, "logging__save_steps": 2}
    specs = {
        name: short_training(untied if "method" in changes else tiny, data, **common | changes)
        for name, changes in COMPARED.items()
    }
    runs = {name: {"single": lay_out(RunDir(folder / "single" / name), spec)} for name, spec in specs.items()}
    train_many(*(kinds["single"] for kinds in runs.values()))
    for name, label in CASES:
        changed = divided(specs[name], {"num_processes": 2, "strategy": STRATEGIES[label]})
        runs[name][label] = copied(runs[name]["single"], folder / label / name, changed)
    together(2, *(run for kinds in runs.values() for label, run in kinds.items() if label != "single"))
    for label in STRATEGIES:
        spec = RunSpec.from_yaml(runs["full"][label].spec.read_text(encoding="utf-8"))
        runs["full"][f"{label}, resumed"] = cut_back(runs["full"][label], folder / f"{label}, resumed", spec)
    wrong = copied(runs["full"]["single"], folder / "wrong", spec.change("hardware.strategy", "zero2"))
    write_text(wrong.accelerate, configuration(spec.change("hardware.strategy", "ddp").hardware, ""))
    runs["full"]["launched as ddp"] = wrong
    together(2, wrong, *(run for label, run in runs["full"].items() if label.endswith("resumed")))
    return runs


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_two_processes_learn_what_one_learns(trained: dict[str, dict[str, RunDir]], name: str, strategy: str) -> None:
    alone, both = trained[name]["single"], trained[name][strategy]
    losses, weights = logged(alone, "loss"), learned(both)
    assert len(losses) == 3
    assert abs(losses[2] - losses[0]) > 0.005  # its own steps have had an effect
    assert logged(both, "loss") == pytest.approx(losses, rel=2e-4)
    assert logged(both, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=2e-3)
    assert logged(both, "learning_rate") == logged(alone, "learning_rate")
    assert weights.keys() == learned(alone).keys()
    expected = learned(alone)
    assert {tensor: array.dtype for tensor, array in weights.items()} == {
        tensor: array.dtype for tensor, array in expected.items()
    }
    apart = {tensor: np.linalg.norm(weights[tensor] - array) for tensor, array in expected.items()}
    norms = {tensor: np.linalg.norm(array) for tensor, array in expected.items()}
    if "bf16" in name:  # rounding, with DDP as well, turns single steps of weights with hardly any gradient around
        apart, norms = {"": np.linalg.norm([*apart.values()])}, {"": np.linalg.norm([*norms.values()])}
    assert all(apart[tensor] <= 0.02 * norm for tensor, norm in norms.items())
    assert read_json(both.path / "checkpoint-2" / "complete.json")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_bit_for_bit(trained: dict[str, dict[str, RunDir]], strategy: str) -> None:
    whole, resumed = trained["full"][strategy], trained["full"][f"{strategy}, resumed"]
    assert logged(resumed, "loss") == logged(whole, "loss")[2:]
    assert all(np.array_equal(learned(resumed)[tensor], expected) for tensor, expected in learned(whole).items())


def test_a_run_that_deepspeed_does_not_divide_ends(trained: dict[str, dict[str, RunDir]]) -> None:
    run = trained["full"]["launched as ddp"]
    assert [each["code"] for each in read_json(run.error)["problems"]] == ["zero-not-started"]
    assert not run.metrics.exists()


@pytest.mark.parametrize(("clipping", "optimizer", "settings"), [
    (0.5, SGD, None), (1.0, SGD, "max_grad_norm=1.0"), (0.5, AdamW, "optim=AdamW"),
])  # fmt: skip
def test_an_engine_with_other_settings_than_the_run_is_refused(
    make_spec: Callable[..., RunSpec], clipping: float, optimizer: type[Optimizer], settings: str | None
) -> None:
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 2,
        gradient_clipping=lambda: clipping,
        gradient_accumulation_steps=lambda: 3,
        train_micro_batch_size_per_gpu=lambda: 4,
        basic_optimizer=optimizer([{"params": [Parameter(zeros(1))], "initial_lr": 0.1}], lr=0.0),
    )
    trainer = SimpleNamespace(deepspeed=engine, get_optimizer_cls_and_kwargs=lambda _: (SGD, {}))
    arguments: Any = SimpleNamespace(
        max_grad_norm=0.5, gradient_accumulation_steps=3, per_device_train_batch_size=4, learning_rate=0.1
    )
    check = ZeroCheck(make_spec(hardware={"num_processes": 2, "strategy": "zero2"}), trainer)
    with pytest.raises(Refusal) if settings else nullcontext() as refused:
        check.on_train_begin(arguments, TrainerState(), TrainerControl())
    if refused:
        assert [(each.code, each.values) for each in refused.value.problems] == [
            ("zero-differs", {"settings": settings})
        ]


@pytest.mark.usefixtures("forked")
def test_a_killed_rank_ends_the_run_which_resumes_with_as_many_processes(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.SHARD_ON_CPU_VARIABLE, "1")
    hardware = {"device": "cpu", "num_processes": 2, "strategy": "zero3"}
    changes = {"training__max_steps": 18, "logging__save_steps": 6, "method__lora_dropout": 0.1, "hardware": hardware}
    whole, broken = (submitted.submit(make_spec(**changes), workplace) for _ in range(2))
    wait_until(broken.dir.checkpoints, every=0.01)  # each process imports DeepSpeed
    ranks = [process for process in find_processes(broken.path) if environment_of(process).get("RANK") == "1"]
    ranks[-1].kill()
    wait_until(broken.dir.exit.exists)
    why = failures.explain(submitted.get(workplace.saves, broken.id))
    assert why
    assert why.code in ("killed", "rank-killed")
    assert find_processes(broken.path) == []
    with pytest.raises(Refusal) as refused:
        resumption.moved(submitted.get(workplace.saves, broken.id), 1, [])
    assert [problem.code for problem in refused.value.problems] == ["resume-deepspeed"]

    submitted.resume(submitted.get(workplace.saves, broken.id))
    wait_until(broken.dir.exit.exists)
    wait_until(whole.dir.exit.exists)
    assert {read_json(run.dir.exit)["outcome"] for run in (whole, broken)} == {"finished"}
    losses = {line["step"]: line["loss"] for line in read_lines(broken.dir.metrics)}
    assert list(losses.values()) == logged(whole.dir, "loss")
    for tensor, expected in learned(whole.dir).items():
        assert np.array_equal(learned(broken.dir)[tensor], expected), tensor
