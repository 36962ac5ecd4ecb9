"""Let the demo vision model learn what is in pictures, from preferences and rewards.

`python -m tests.image_learning FOLDER [dpo|kto|grpo …]` trains, asks the results about pictures that they have never
seen, and prints curves and scores as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from engine.core.rundir import RunDir, read_json, read_lines, write_json
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import DEMO_VISION_MODEL
from engine.worker.evaluate import evaluate
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests.conftest import short_training
from tests.forked import fork_programs
from tests.train_many import lay_out

DATA = DEMO_VISION_MODEL.parent
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
COLUMNS = {"prompt": "instruction", "images": "images"}
CURVES = {"dpo": "rewards/accuracies", "kto": "rewards/margins", "grpo": "reward"}


def in_another_colour(answer: str, number: int) -> str:
    _, colour, shape = answer.split()
    others = [other for other in COLOURS if other != colour]
    other = others[number % len(others)]
    return f"{'An' if other == 'orange' else 'A'} {other} {shape}"


def write_data(folder: Path) -> None:
    """Pairs and rated answers: right, or with another colour."""
    shutil.copytree(DATA / "shapes", folder / "shapes")
    entries: dict[str, Any] = {}
    for name in ("shapes", "shapes_test"):
        rows = read_json(DATA / f"{name}.json")
        pairs, thumbs = [], []
        for number, row in enumerate(rows):
            right = row.pop("output")
            wrong = in_another_colour(right, number)
            pairs.append(row | {"chosen": right, "rejected": wrong})
            thumbs += [row | {"output": right, "good": True}, row | {"output": wrong, "good": False}]
        write_json(folder / f"{name}_pairs.json", pairs)
        write_json(folder / f"{name}_thumbs.json", thumbs)
        shutil.copy(DATA / f"{name}.json", folder)
        roles = {"chosen": "chosen", "rejected": "rejected"}
        entries[f"{name}_pairs"] = {"file_name": f"{name}_pairs.json", "ranking": True, "columns": COLUMNS | roles}
        roles = {"response": "output", "kto_tag": "good"}
        entries[f"{name}_thumbs"] = {"file_name": f"{name}_thumbs.json", "columns": COLUMNS | roles}
        entries[name] = {"file_name": f"{name}.json", "columns": COLUMNS | {"response": "output"}}
    write_json(folder / "dataset_info.json", entries)


def trained(root: Path, name: str, data: str, **changes: Any) -> RunDir:
    settings: dict[str, Any] = {
        "method": {"kind": "lora", "r": 16}, "data__datasets": [f"shapes{data}"],
        "data__eval_datasets": [f"shapes_test{data}"], "training__max_steps": 30, "logging__eval_steps": 30,
        "training__per_device_train_batch_size": 20, "training__per_device_eval_batch_size": 60,
    }  # fmt: skip
    run = lay_out(RunDir(root / "runs" / name), short_training(DEMO_VISION_MODEL, root, **settings | changes))
    prepare(run)
    train(run)
    return run


def evaluated(root: Path, runs: dict[str, RunDir]) -> dict[str, float]:
    """The share of exact answers about the held-out pictures, in percent, by stage."""
    for run in runs.values():
        write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
    spec = EvaluationSpec.read(
        {
            "model": {"model_name_or_path": str(DEMO_VISION_MODEL)},
            "results": [str(run.adapter) for run in runs.values()],
            "with_base": False,
            "data": {"datasets": ["shapes_test"], "dataset_dir": str(root), "max_samples": 30},
            "generation": {"max_new_tokens": 8},
            "hardware": {"device": "cpu"},
        }
    )
    run = lay_out(RunDir(root / "runs" / "evaluation"), spec)
    evaluate(run)
    values = report.summary(run)["measures"]["exact"]["values"]
    return {voice.split("/")[-1]: value["value"] for voice, value in values.items()}


def curve(run: RunDir, name: str) -> list[float]:
    return [line[name] for line in read_lines(run.metrics) if name in line]


def dpo(root: Path) -> dict[str, RunDir]:
    stage = {"kind": "dpo", "sft_weight": 1.0}
    return {"dpo": trained(root, "dpo", "_pairs", stage=stage, training__max_steps=24, logging__eval_steps=24)}


def kto(root: Path) -> dict[str, RunDir]:
    return {"kto": trained(root, "kto", "_thumbs", stage={"kind": "kto"})}


def grpo(root: Path) -> dict[str, RunDir]:
    """After a short SFT, since it can only improve what is sometimes right."""
    begun = trained(root, "sft", "", stage={"kind": "sft"}, training__max_steps=12)
    stage = {"kind": "grpo", "rewards": {"exact": 1}, "num_generations": 5, "max_new_tokens": 8}
    changes: dict[str, Any] = {"model__adapter_path": str(begun.adapter), "training__learning_rate": 2e-3}
    changes |= {"training__max_steps": 40, "training__per_device_train_batch_size": 40}
    return {"sft": begun, "grpo": trained(root, "grpo", "", stage=stage, **changes)}


def main(root: Path, stages: list[str]) -> None:
    torch.set_num_threads(1)  # the model is too small for more to help
    root.mkdir(parents=True, exist_ok=True)
    write_data(root)
    runs: dict[str, RunDir] = {}
    for stage in stages:
        runs |= {"dpo": dpo, "kto": kto, "grpo": grpo}[stage](root)
    curves = {stage: [curve(runs[stage], f"{split}{CURVES[stage]}") for split in ("", "eval_")] for stage in stages}
    print("\n" + json.dumps(curves | {"exact": evaluated(root, runs)}))


if __name__ == "__main__":
    fork_programs()
    main(Path(sys.argv[1]), sys.argv[2:])
