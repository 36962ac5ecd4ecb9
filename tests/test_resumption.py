"""A training that is resumed with another number of processes learns what an uninterrupted one learns.

Real processes on the CPU (gloo), as in `test_sharding`. Each step has twelve examples, whoever computes them: one
process six batches of two, two processes three each, three processes two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import RunDir, read_json, read_lines, write_json
from engine.launch import command
from engine.launch.workspace import Workplace
from engine.preflight.strategy import write_configuration
from engine.runs import queue, resumption, runs
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, short_training, wait_until
from tests.preloaded import run_ranks
from tests.train_many import lay_out, train_many
from webui.runs_tab import head_html
from webui.words import Words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

STEPS, CHECKPOINT, BATCHES = 4, 2, 6  # an epoch of whole steps
PAIRS = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
RANDOM_ORDER = {"data__group_by_length": False}  # otherwise it is made for a number of processes, and kept
# Training → its changes, the strategy of several processes, and how many go on after how many.
MOVES: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "sft": ({}, "ddp", 1, 2),
    "dpo": (RANDOM_ORDER | {"stage": {"kind": "dpo"}, "data__datasets": ["pairs"]}, "ddp", 2, 1),
    "divided": (RANDOM_ORDER | {"method": {"kind": "full"}, "training__learning_rate": 1e-3}, "fsdp2", 2, 3),
}


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("resumption")
    (folder / "saves").mkdir()
    (folder / "data").mkdir()
    rows = [{"instruction": f"What comes after {n}?", "input": "", "output": "yes " * (n % 7 + 1)} for n in range(48)]
    pairs = [row | {"chosen": f"{n + 1}.", "rejected": f"No idea {n}"} for n, row in enumerate(rows)]
    info = {"chat": {"file_name": "chat.json"}, "pairs": {"file_name": "pairs.json", "ranking": True, "columns": PAIRS}}
    for name, table in {"chat": rows, "pairs": pairs, "dataset_info": info}.items():
        (folder / "data" / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    return Workplace(models=(tiny.parent,), data=folder / "data", saves=folder / "saves")


def spec_for(place: Workplace, tiny: Path, processes: int, strategy: str = "auto", **changes: Any) -> RunSpec:
    common = {
        "training__max_steps": STEPS,
        "training__per_device_train_batch_size": 2,
        "training__gradient_accumulation_steps": BATCHES // processes,
        "logging__save_steps": CHECKPOINT,
    }
    spec = short_training(tiny, place.data, **common | changes)
    devices = {"device": "cpu", "num_processes": processes, "strategy": strategy if processes > 1 else "auto"}
    return spec.change("hardware", devices)


def train_together(count: int, *folders: RunDir) -> None:
    for run in folders:
        write_configuration(RunSpec.from_yaml(run.spec.read_text(encoding="utf-8")), run.path, 0)
    environment = command.environment(RunSpec(), folders[0].path, gpus=(), threads=1)
    run_ranks(count, "-m", "tests.train_ranks", *(run.path for run in folders), env=environment)


def cut_back(run: RunDir) -> None:
    """What is left of a run that was killed behind its checkpoint."""
    shutil.rmtree(run.result())
    shutil.rmtree(run.path / f"checkpoint-{STEPS}")
    write_json(run.exit, {"outcome": "failed", "reason": "killed", "code": 1, "ended": 1.0})


def learned(run: RunDir) -> dict[str, np.ndarray]:
    folder = run.result()
    assert folder, run.error.read_text(encoding="utf-8") if run.error.exists() else "no result"
    return load_file(next(folder.glob("*model.safetensors")))


def losses(run: RunDir) -> list[float]:
    """Of each step; of one that was taken again, the later loss."""
    return list({line["step"]: line["loss"] for line in read_lines(run.metrics) if "loss" in line}.values())


def assert_same(run: RunDir, whole: RunDir) -> None:
    """As an uninterrupted run, to rounding: its losses, and what it has learned since the checkpoint, which depends on
    the state of the optimizer."""
    assert losses(run) == pytest.approx(losses(whole), rel=2e-4)
    assert len(losses(run)) == STEPS
    before = load_file(next((whole.path / f"checkpoint-{CHECKPOINT}").glob("*model.safetensors")))
    now, expected = learned(run), learned(whole)
    moved = sum(float(np.square(expected[name] - before[name]).sum()) for name in expected) ** 0.5
    apart = sum(float(np.square(expected[name] - now[name]).sum()) for name in expected) ** 0.5
    assert apart < 0.05 * moved


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are resumed, but only the test starts them."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    monkeypatch.setenv(command.SHARD_ON_CPU_VARIABLE, "1")


@pytest.mark.usefixtures("still")
def test_other_numbers_of_processes_learn_what_would_have_been_learned(place: Workplace, tiny: Path) -> None:
    folder = place.saves / "tiny" / "lora"
    whole = {
        name: lay_out(RunDir(folder / f"{name}-whole"), spec_for(place, tiny, 1, **changes))
        for name, (changes, *_) in MOVES.items()
    }
    train_many(*whole.values())
    broken = {}
    for name, (changes, strategy, before, _) in MOVES.items():
        if before == 1:
            broken[name] = RunDir(shutil.copytree(whole[name].path, folder / name))
        else:
            broken[name] = lay_out(RunDir(folder / name), spec_for(place, tiny, before, strategy, **changes))
            shutil.copytree(whole[name].prepared, broken[name].prepared)
    train_together(2, *(broken[name] for name, (_, _, before, _) in MOVES.items() if before == 2))
    for name, (_, _, _, after) in MOVES.items():
        cut_back(broken[name])
        run = runs.get(place.saves, f"tiny/lora/{name}")
        runs.resume(run, spec=resumption.moved(run, after, []))
    train_many(broken["dpo"])
    train_together(2, broken["sft"])
    train_together(3, broken["divided"])
    for name, run in broken.items():
        assert_same(run, whole[name])
    [notice] = read_warnings(broken["divided"])
    assert notice.problem.text() == (
        "From step 2 on, 3 processes train instead of 2, each with 2 batches per step. A step has the same 12 examples "
        "as before, in the same order; only random numbers, such as those of dropout, are others."
    )
    assert "num_processes: 3" in broken["divided"].accelerate.read_text(encoding="utf-8")
    assert not broken["dpo"].accelerate.exists()
    past = broken["dpo"].attempts / "1"
    assert RunSpec.from_yaml((past / "spec.yaml").read_text(encoding="utf-8")).hardware.num_processes == 2


def test_a_stopped_run_goes_on_with_one_process_from_the_shell(place: Workplace, tiny: Path) -> None:
    run = runs.submit(spec_for(place, tiny, 2, training__max_steps=100_000), place)
    wait_until(run.dir.checkpoints, every=0.01)
    runs.stop(run, "kill")
    wait_until(run.dir.exit.exists)
    done = engine(place, "resume", run.id, "--processes", "4")
    assert done.returncode == 2
    assert "Possible numbers of processes: 1, 2, 3, 6." in done.stderr
    assert engine(place, "resume", run.id, "--processes", "1").returncode == 0
    wait_until(lambda: len(losses(run.dir)) > 8 and runs.state(run.dir) == "running")
    now = runs.get(place.saves, run.id)
    assert now.spec.hardware.num_processes == 1
    assert read_json(run.dir.request)["devices"]["count"] == 0
    assert "1 process trains instead of 2, each with 6 batches" in head_html.cautions(now, Words("en"))
    assert "1 个进程训练（原为 2 个）" in head_html.cautions(now, Words("zh"))
    runs.stop(now, "kill")
    wait_until(run.dir.exit.exists)


REFUSED = [
    ({"stage": {"kind": "kto"}}, 1, "resume-stage-needs-processes"),
    ({"extra": {"dataloader_drop_last": True}}, 1, "resume-drops-last"),
    ({}, 3, "resume-uneven"),
    ({}, 1000, "resume-uneven"),
    ({"hardware__strategy": "fsdp2"}, 1, "resume-divided"),
    ({"hardware__strategy": "zero2"}, 1, "resume-deepspeed"),
]


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(("changes", "count", "code"), REFUSED)
def test_what_would_not_be_the_same_training_is_refused(
    workplace: Workplace, tiny: Path, make_spec: Callable[..., RunSpec], changes: dict[str, Any], count: int, code: str
) -> None:
    folder = workplace.saves / "tiny" / "lora" / "run"
    run = lay_out(RunDir(folder), make_spec(hardware__num_processes=2, **changes))
    write_configuration(RunSpec.from_yaml(run.spec.read_text(encoding="utf-8")), run.path, 0)
    (folder / "checkpoint-3").mkdir()
    write_json(folder / "checkpoint-3" / "complete.json", {"step": 3, "done": False})
    write_json(run.exit, {"outcome": "stopped", "ended": 1.0})
    with pytest.raises(Refusal) as refused:
        resumption.moved(runs.get(workplace.saves, "tiny/lora/run"), count, [])
    assert [each.code for each in refused.value.problems] == [code]
    assert count not in resumption.possible_processes(runs.get(workplace.saves, "tiny/lora/run"))
