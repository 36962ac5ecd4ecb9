"""From one stage to the next, as a person in a shell goes: SFT, a reward model on top of it, PPO with both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.progress import curves
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until

pytestmark = pytest.mark.usefixtures("forked")


def add_pairs(data: Path) -> None:
    """Pairs that can be told apart by their first word."""
    rows = [{"instruction": f"What comes after {n}?", "chosen": f"{n + 1}.", "rejected": f"no {n}."} for n in range(40)]
    (data / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"] = {"file_name": "pairs.json", "ranking": True}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def submitted(workplace: Workplace, yaml: str) -> runs.Run:
    """The run of a spec, at its end."""
    done = engine(workplace, "submit", "-", input=yaml)
    assert done.returncode == 0, done.stderr
    return wait_until(lambda: ended(workplace, done.stdout.strip()))


def ended(workplace: Workplace, id: str) -> runs.Run | None:
    run = runs.get(workplace.saves, id)
    return run if run.final else None


def following(workplace: Workplace, run: runs.Run, stage: str, **changes: object) -> runs.Run:
    """The run of `stage` that goes on from `run`."""
    printed = engine(workplace, "follow", run.id, stage)
    assert printed.returncode == 0, printed.stderr
    spec = RunSpec.from_yaml(printed.stdout)
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return submitted(workplace, spec.to_yaml())


@pytest.mark.slow
def test_sft_then_a_reward_model_then_ppo(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    add_pairs(workplace.data)
    sft = submitted(workplace, make_spec(name="answers").to_yaml())
    assert sft.state == "finished", sft.dir.log.read_text(encoding="utf-8")[-3000:]

    judge = following(
        workplace, sft, "rm", data__validation_share=0.2, training__max_steps=20, training__learning_rate=5e-3
    )
    assert judge.state == "finished", judge.dir.log.read_text(encoding="utf-8")[-3000:]
    assert judge.spec.model.adapter_path == str(sft.path / "adapter")
    accuracy = json.loads((judge.path / "adapter" / "evaluation.json").read_text(encoding="utf-8"))["accuracy"]
    assert accuracy >= 0.9

    policy = following(workplace, judge, "ppo", training__max_steps=2, stage__max_new_tokens=8, logging__save_steps=2)
    assert policy.state == "finished", policy.dir.log.read_text(encoding="utf-8")[-3000:]
    assert policy.spec.model.adapter_path == str(sft.path / "adapter")
    assert policy.spec.stage.reward_model == str(judge.path / "adapter")
    assert {"reward", "kl"} <= set(curves(policy))
