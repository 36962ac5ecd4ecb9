"""Several processes for one training: what FSDP2 learns is what one process learns, and nothing is silently otherwise.

Two real processes on the CPU (gloo). accelerate divides weights on GPUs only, so a variable of the tests lets it do so
here (`engine.worker.runtime.sharding`); all else is what a machine with GPUs does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.core.rundir import RunDir, read_json, read_lines, write_text
from engine.launch import command
from engine.launch.accelerate_config import configuration, is_fsdp
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.preflight.strategy import write_configuration
from engine.runs import failures, progress, queue
from engine.runs import runs as submitted
from engine.runs.results import new_export_spec
from engine.spec.hardware_settings import Ddp, TrainingHardware
from engine.spec.run_spec import RunSpec
from tests.conftest import short_training, wait_until
from tests.hold import release
from tests.preloaded import run_ranks
from tests.train_many import lay_out, train_many
from webui.runs_tab import output_html
from webui.words import Words

pytestmark = pytest.mark.slow

FULL = {"method": {"kind": "full"}, "training__learning_rate": 1e-3}
# What is trained by one process, and by two with FSDP2.
COMPARED: dict[str, dict[str, Any]] = {
    "full": FULL | {"training__gradient_checkpointing": True, "training__gradient_accumulation_steps": 2},
    "packed": {"stage": {"kind": "pt"}, "data__datasets": ["text"], "data__packing": True},
    "qlora": {"model__quantization": {"kind": "4bit"}},
    "dpo": FULL | {"stage": {"kind": "dpo"}, "data__datasets": ["pairs"]},
    "kto": {"stage": {"kind": "kto"}, "data__datasets": ["thumbs"]},
    "orpo": FULL | {"stage": {"kind": "orpo"}, "data__datasets": ["pairs"]},
}
# Which of these also by four processes on two machines, each with a copy of the model that its two processes divide.
HYBRID = ("full", "qlora", "dpo")
# Which of these, and of GRPO, go on from their checkpoint with FSDP2; a LoRA run does so after it was killed, below.
RESUMED = ("full", "qlora", "dpo", "grpo")
# Two processes generate other answers than one, but with FSDP2 the same as with DDP.
GRPO = {
    "stage": {
        "kind": "grpo", "rewards": ["format"], "reward_pattern": ".*[aeo].*", "num_generations": 4,
        "max_new_tokens": 12, "num_iterations": 2,
    },
    "training__per_device_train_batch_size": 4,
    # Many tokens end an answer, so that one process is done before the other.
    "extra": {"generation_kwargs": {"eos_token_id": list(range(100, 280))}},
}  # fmt: skip


def write_data(folder: Path) -> Path:
    folder.mkdir()
    questions = [{"instruction": f"What comes after {n}?", "input": ""} for n in range(32)]
    tables = {
        "chat": [row | {"output": f"{n + 1}."} for n, row in enumerate(questions)],
        "text": [{"text": f"After {n} comes {n + 1}. " * 5} for n in range(60)],
        "pairs": [row | {"chosen": f"{n + 1}.", "rejected": f"No idea {n}"} for n, row in enumerate(questions)],
        "thumbs": [row | {"output": f"{n + 1}.", "label": bool(n % 3)} for n, row in enumerate(questions)],
    }
    pairs = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    thumbs = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    more = {
        "text": {"columns": {"prompt": "text"}},
        "pairs": {"ranking": True, "columns": pairs},
        "thumbs": {"columns": thumbs},
    }
    info = {name: {"file_name": f"{name}.json"} | more.get(name, {}) for name in tables}
    for name, table in (tables | {"dataset_info": info}).items():
        (folder / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def with_own_head(model: Path, folder: Path) -> Path:
    """The same model with a head that is not its embeddings."""
    shutil.copytree(model, folder)
    config = read_json(folder / "config.json") | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_two(spec: RunSpec, strategy: str) -> RunSpec:
    """The same training by two processes, each with half of every batch."""
    return divided(spec, {"num_processes": 2, "strategy": strategy})


def by_four(spec: RunSpec) -> RunSpec:
    """The same training by two processes on each of two machines."""
    hybrid = {"kind": "fsdp2", "sharding": "hybrid"}
    return divided(spec, {"num_processes": 4, "num_machines": 2, "strategy": hybrid})


def divided(spec: RunSpec, devices: dict[str, Any]) -> RunSpec:
    batch = spec.training.per_device_train_batch_size // devices["num_processes"]
    spec = spec.change("training.per_device_train_batch_size", batch)
    return spec.change("hardware", {"device": "cpu"} | devices)


def copied(alone: RunDir, folder: Path, spec: RunSpec) -> RunDir:
    """The run of `alone`, with its prepared rows, for several processes."""
    run = lay_out(RunDir(folder), spec)
    shutil.copytree(alone.prepared, run.prepared)
    write_configuration(spec, run.path, 0)
    return run


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, RunDir]]:
    """Name of a training → "single", "ddp" or "fsdp2" → its run, after it has ended."""
    folder = tmp_path_factory.mktemp("strategies")
    data, untied = write_data(folder / "data"), with_own_head(tiny, folder / "untied")
    common = {"training__max_steps": 3, "data__group_by_length": False, "logging__save_steps": 2}
    specs = {
        name: short_training(untied if "method" in changes else tiny, data, **common | changes)
        for name, changes in {**COMPARED, "grpo": GRPO}.items()
    }
    single = {name: lay_out(RunDir(folder / "single" / name), spec) for name, spec in specs.items()}
    train_many(*single.values())
    runs = {name: {"single": run} for name, run in single.items()}
    for name, spec in specs.items():
        for strategy in ("ddp", "fsdp2") if name in ("grpo", "full") else ("fsdp2",):
            runs[name][strategy] = copied(single[name], folder / strategy / name, by_two(spec, strategy))
    whole = copied(single["full"], folder / "whole", by_two(specs["full"], "fsdp2"))
    wrong = TrainingHardware(num_processes=2, strategy=Ddp())
    write_text(whole.accelerate, configuration(wrong, "another than that of the run"))
    runs["full"]["fsdp2, launched as ddp"] = whole
    together(2, *(run for kinds in runs.values() for name, run in kinds.items() if name != "single"))
    for name in RESUMED:
        again = cut_back(runs[name]["fsdp2"], folder / "resumed" / name, by_two(specs[name], "fsdp2"))
        runs[name]["fsdp2, resumed"] = again
    together(2, *(runs[name]["fsdp2, resumed"] for name in RESUMED))

    for name in HYBRID:
        runs[name]["hybrid"] = copied(single[name], folder / "hybrid" / name, by_four(specs[name]))
    once = copied(single["full"], folder / "once", by_four(specs["full"]))
    write_text(once.accelerate, without_copies(once.accelerate.read_text(encoding="utf-8")))
    runs["full"]["hybrid, launched as full"] = once
    together(4, once, *(runs[name]["hybrid"] for name in HYBRID))
    resumed = {"hybrid, resumed": "hybrid", "hybrid, begun in full": "fsdp2"}
    for name, begun in resumed.items():
        runs["full"][name] = cut_back(runs["full"][begun], folder / name, by_four(specs["full"]))
    together(4, *(runs["full"][name] for name in resumed))
    return runs


def together(count: int, *runs: RunDir) -> None:
    """Train them one after the other with as many processes."""
    environment = command.environment(RunSpec(), runs[0].path, gpus=(), threads=count)
    run_ranks(count, "-m", "tests.train_ranks", *(run.path for run in runs), env=environment)


def without_copies(text: str) -> str:
    return text[: text.index("parallelism_config:")]


def cut_back(run: RunDir, folder: Path, spec: RunSpec) -> RunDir:
    """A copy of a run, as if it had ended after its checkpoint."""
    rest = RunDir(shutil.copytree(run.path, folder))
    shutil.rmtree(rest.result())
    shutil.rmtree(rest.path / "checkpoint-3")
    rest.metrics.unlink()
    write_text(rest.spec, spec.to_yaml())
    write_text(rest.accelerate, configuration(spec.hardware, ""))
    return rest


def logged(run: RunDir, name: str) -> list[float]:
    return [line[name] for line in read_lines(run.metrics) if name in line]


def learned(run: RunDir) -> dict[str, np.ndarray]:
    folder = run.result()
    assert folder, run.error.read_text(encoding="utf-8") if run.error.exists() else "no result"
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "fsdp2") for name in COMPARED), ("full", "ddp"), *((name, "hybrid") for name in HYBRID)],
)
def test_several_processes_learn_what_one_learns(
    trained: dict[str, dict[str, RunDir]], name: str, strategy: str
) -> None:
    alone, together = trained[name]["single"], trained[name][strategy]
    losses, weights = logged(alone, "loss"), learned(together)
    assert len(losses) == 3
    assert abs(losses[2] - losses[0]) > 0.005  # its own steps have had an effect
    assert logged(together, "loss") == pytest.approx(losses, rel=2e-4)
    assert logged(together, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=2e-3)
    assert weights.keys() == learned(alone).keys()
    for tensor, expected in learned(alone).items():
        assert np.linalg.norm(weights[tensor] - expected) <= 0.02 * np.linalg.norm(expected), tensor
    assert read_json(together.path / "checkpoint-2" / "complete.json")


def test_grpo_generates_and_learns_with_fsdp2_as_with_ddp(trained: dict[str, dict[str, RunDir]]) -> None:
    runs = trained["grpo"]
    assert learned(runs["fsdp2"])
    assert logged(runs["ddp"], "answer_length")[0] < 12
    for name in ("loss", "reward", "grad_norm", "entropy", "answer_length"):
        assert logged(runs["fsdp2"], name) == pytest.approx(logged(runs["ddp"], name), rel=1e-3, abs=1e-6), name
    assert len(set(logged(runs["ddp"], "loss"))) > 1


@pytest.mark.parametrize("name", RESUMED)
def test_a_divided_training_goes_on_from_its_checkpoint_bit_for_bit(
    trained: dict[str, dict[str, RunDir]], name: str
) -> None:
    whole, resumed = trained[name]["fsdp2"], trained[name]["fsdp2, resumed"]
    assert logged(resumed, "loss") == logged(whole, "loss")[2:]
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")[2:]
    expected = learned(whole)
    assert all(np.array_equal(tensor, expected[key]) for key, tensor in learned(resumed).items())
    assert learned(resumed).keys() == expected.keys()


def test_weights_that_are_whole_although_the_spec_says_fsdp2_end_the_run(
    trained: dict[str, dict[str, RunDir]],
) -> None:
    run = trained["full"]["fsdp2, launched as ddp"]
    assert [each["code"] for each in read_json(run.error)["problems"]] == ["weights-not-sharded"]
    assert not run.metrics.exists()


def test_copies_divided_within_each_machine_go_on_bit_for_bit(trained: dict[str, dict[str, RunDir]]) -> None:
    runs = trained["full"]
    assert logged(runs["hybrid, resumed"], "loss") == logged(runs["hybrid"], "loss")[2:]
    whole, resumed = learned(runs["hybrid"]), learned(runs["hybrid, resumed"])
    assert all(np.array_equal(resumed[tensor], expected) for tensor, expected in whole.items())
    # A checkpoint has whole weights, whatever has been divided among whom.
    assert logged(runs["hybrid, begun in full"], "loss") == pytest.approx(logged(runs["fsdp2"], "loss")[2:], rel=2e-4)


def test_a_model_that_is_divided_among_others_than_the_spec_says_ends_the_run(
    trained: dict[str, dict[str, RunDir]],
) -> None:
    run = trained["full"]["hybrid, launched as full"]
    assert [each["code"] for each in read_json(run.error)["problems"]] == ["weights-copied"]
    assert not run.metrics.exists()


@pytest.mark.usefixtures("forked")
def test_a_divided_run_that_is_killed_resumed_stopped_and_resumed_ends_bit_for_bit_and_is_exported(
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    hold: Callable[[RunDir, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(command.SHARD_ON_CPU_VARIABLE, "1")
    hardware = {"device": "cpu", "num_processes": 2, "strategy": "fsdp2"}
    changes = {"training__max_steps": 18, "logging__save_steps": 6, "method__lora_dropout": 0.1, "hardware": hardware}
    whole, broken = (submitted.submit(make_spec(**changes), workplace, start=False) for _ in range(2))
    hold(broken.dir, 10)  # it must not end before it is killed
    queue.advance(workplace.saves)
    wait_until(broken.dir.checkpoints, every=0.01)
    ranks = [process for process in find_processes(broken.path) if process.environ().get("RANK") == "1"]
    ranks[-1].kill()
    wait_until(broken.dir.exit.exists)
    # Either the launcher has noticed it first, or the other rank, that its peer is gone.
    why = failures.explain(submitted.get(workplace.saves, broken.id))
    assert why
    assert why.code in ("killed", "rank-killed")
    assert why.values["signal"] == "SIGKILL"
    assert find_processes(broken.path) == []
    reached = len(logged(broken.dir, "loss"))
    assert 6 <= reached <= 10

    hold(broken.dir, 14)
    submitted.resume(submitted.get(workplace.saves, broken.id))
    wait_until(lambda: progress.progress(again := submitted.get(workplace.saves, broken.id)).done == 14 and again)
    submitted.stop(submitted.get(workplace.saves, broken.id), "save")
    release(broken.dir)
    wait_until(broken.dir.exit.exists)
    assert submitted.get(workplace.saves, broken.id).state == "stopped"
    stopped_at = int(broken.dir.checkpoints()[-1].name.rpartition("-")[2])
    assert stopped_at == 14
    submitted.resume(submitted.get(workplace.saves, broken.id))
    wait_until(broken.dir.exit.exists)
    assert {read_json(run.dir.exit)["outcome"] for run in (whole, broken)} == {"finished"}
    assert is_fsdp(broken.dir.accelerate.read_text(encoding="utf-8"))
    assert "distributed_type: FSDP" in output_html.settings(submitted.get(workplace.saves, broken.id), Words("en"))
    losses = {line["step"]: line["loss"] for line in read_lines(broken.dir.metrics)}
    assert list(losses.values()) == logged(whole.dir, "loss")
    for tensor, expected in learned(whole.dir).items():
        assert np.array_equal(learned(broken.dir)[tensor], expected), tensor
    merged = submitted.submit(new_export_spec(workplace, {broken.id: 1.0}), workplace)
    wait_until(merged.dir.exit.exists)
    assert submitted.get(workplace.saves, merged.id).state == "finished"
