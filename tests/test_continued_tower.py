"""An adapter trained on the vision tower is continued by other stages, on two processes and rows without images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import read_lines, write_json
from engine.launch.workspace import Workplace
from engine.runs import queue, runs
from tests.conftest import short_training, wait_until
from tests.preloaded import run_python

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

FAMILY = "qwen2_5_vl"
TRAIN_TOWER = f"""
import sys
from pathlib import Path
from tests.image_training import write_data, write_model
from tests.vision_training import RUNS, run_of
root = Path(sys.argv[1])
write_data(root)
write_model("{FAMILY}", root / "{FAMILY}" / "base")
print(run_of(root, "{FAMILY}", "adapters", **RUNS["adapters"]).adapter)
"""
STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "kto": {"kind": "kto"},
    "grpo": {
        "kind": "grpo", "rewards": {"format": 1}, "reward_pattern": ".*[a-m].*", "num_generations": 2,
        "max_new_tokens": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads images, an adapter with parts in its tower, and data without images."""
    root = tmp_path_factory.mktemp("tower")
    run_python("-c", TRAIN_TOWER, root)
    questions = [{"instruction": f"What comes after {n}?"} for n in range(16)]
    answers = [f"{n + 1}." for n in range(16)]
    pairs = [row | {"chosen": answer, "rejected": "No."} for row, answer in zip(questions, answers, strict=True)]
    rated = [
        row | {"output": answer, "kto_tag": n % 2 == 0}
        for n, (row, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    chat = [row | {"output": answer} for row, answer in zip(questions, answers, strict=True)]
    for name, rows in (("dpo", pairs), ("kto", rated), ("grpo", chat)):
        write_json(root / f"{name}.json", rows)
    entries: dict[str, Any] = {"grpo": {"file_name": "grpo.json"}}
    entries["dpo"] = {"file_name": "dpo.json", "ranking": True}
    entries["dpo"]["columns"] = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entries["kto"] = {"file_name": "kto.json"}
    entries["kto"]["columns"] = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
    write_json(root / "dataset_info.json", entries)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_processes_do_not_wait_for_gradients_of_a_tower_that_no_row_uses(root: Path, stage: str) -> None:
    adapter = root / FAMILY / "adapters" / "adapter"
    spec = short_training(
        root / FAMILY / "base", root, stage=STAGES[stage], model__adapter_path=str(adapter),
        method__r=4, hardware__num_processes=2, training__max_steps=3, training__per_device_train_batch_size=2,
        training__learning_rate=1e-4, data__max_length=64,
    ).change("data.datasets", [stage])  # fmt: skip
    workplace = Workplace(models=(root,), data=root, saves=root / "saves", reward_files=(root,))
    workplace.saves.mkdir(exist_ok=True)
    run = runs.submit(spec, workplace)
    run = wait_until(lambda: (now := runs.read(run.path, queue.saves_of(run.path))).final and now)
    assert run.state == "finished", run.dir.log.read_text(encoding="utf-8")[-3000:]
    assert [line["step"] for line in read_lines(run.dir.metrics) if "loss" in line] == [1, 2, 3]
