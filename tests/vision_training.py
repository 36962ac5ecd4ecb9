"""Train tower, projector and language part of tiny models in different ways: `python -m tests.vision_training FOLDER`.

What was trained is found by comparing the written files with those of the base. As the first step of Adam moves every
weight by its learning rate, the rates are read from the distances. Prints one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, read_lines, write_json
from engine.export.export_spec import ExportSpec
from engine.models.vision_parts import name_in_base
from engine.preflight.model_checks import adapted_modules, trained_parameters
from engine.worker.export import export
from engine.worker.models.loading import load_model, save_weights
from engine.worker.models.structure import structure_of
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests import zoo
from tests.conftest import short_training
from tests.image_training import FAMILIES, ROWS, inputs_by_hand, write_data, write_model
from tests.train_many import lay_out

RATE, TOWER_RATE, PROJECTOR_RATE = 1e-3, 1e-4, 4e-4
ONE_STEP = {"training__max_steps": 1, "training__lr_scheduler_type": "constant", "training__learning_rate": RATE}
RATES = {"vision__tower_learning_rate": TOWER_RATE, "vision__projector_learning_rate": PROJECTOR_RATE}
LORA = {"method": {"kind": "lora", "r": 4}}
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "adapters": LORA | RATES | {"vision__tower": "adapter", "vision__projector": "adapter"},
    "mixed": LORA | RATES | {"vision__tower": "adapter", "vision__projector": "trained"},
    "tower alone": LORA | {"vision__tower": "adapter", "vision__language_part": "frozen"},
    "tower whole": LORA | RATES | {"vision__tower": "trained", "vision__projector": "adapter"},
    "full": {"method": "full"} | RATES | {"vision__tower": "trained", "vision__projector": "trained"},
    "projector alone": {"method": "full", "vision__projector": "trained", "vision__language_part": "frozen"},
    "layer and tower": {"method": {"kind": "freeze", "trainable_layers": 1}, "vision__tower": "trained"},
}
RUNS_OF = {"qwen2_5_vl": tuple(RUNS), "gemma3": ("mixed", "full")}
OTHER_FAMILIES = ("llava_next", "idefics3", "llama4", "gemma4", "minicpmv4_6", "video_llava", "janus", "llama")


def spec_of(root: Path, family: str, **changes: Any) -> Any:
    settings = {"training__per_device_train_batch_size": len(ROWS), "data__max_length": 256} | ONE_STEP
    # What trains vision parts alone needs an image in every row.
    name = "pictured" if changes.get("vision__language_part") == "frozen" else "seen"
    return short_training(root / family / "base", root, **settings | changes).change("data.datasets", [name])


def run_of(root: Path, family: str, name: str, **changes: Any) -> RunDir:
    run = lay_out(RunDir(root / family / name), spec_of(root, family, **changes))
    prepare(run)
    train(run)
    return run


def base_of(root: Path, family: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(root / family / "base").float()


def distances(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Name → the largest distance that a weight has moved, for those that have."""
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in after.items()}
    return {name: distance for name, distance in moved.items() if distance}


def learned(root: Path, family: str, run: RunDir) -> dict[str, Any]:
    """What is in the result: modules with an adapter, and the distances of all weights from those of the base."""
    base = base_of(root, family)
    before = dict(base.named_parameters())
    if run.model.is_dir():
        after = AutoModelForImageTextToText.from_pretrained(run.model).float()
        return {"adapted": [], "moved": distances(before, dict(after.named_parameters()))}
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in tensors}
    adapted = sorted({name.split(".lora_")[0] for name in names if ".lora_" in name})
    starts = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "lora_B" in name}
    moved = distances(starts, {name: tensors[name] for name in starts})
    whole = {name: tensors[f"base_model.model.{name}"] for name in names if ".lora_" not in name}
    moved = {name.removeprefix("base_model.model.").split(".lora_")[0]: value for name, value in moved.items()}
    return {"adapted": adapted, "moved": moved | distances(before, whole), "whole": sorted(whole)}


def loss_of(family: str, model: Any, root: Path) -> float:
    with torch.no_grad():
        inputs = inputs_by_hand(family, root / family / "base", root, 0, answered=True)
        return float(model.eval()(**inputs, labels=inputs["input_ids"]).loss)


def resumed(root: Path, family: str, **changes: Any) -> float:
    """The largest difference between a run, and another that has continued from its first checkpoint."""
    changes |= {"training__max_steps": 4, "logging__save_steps": 2, "training__lr_scheduler_type": "linear"}
    whole = run_of(root, family, "uninterrupted", **changes)
    run = lay_out(RunDir(root / family / "resumed"), spec_of(root, family, **changes))
    prepare(run)
    shutil.copytree(whole.path / "checkpoint-2", run.path / "checkpoint-2")
    train(run)
    assert read_lines(run.metrics)[0]["step"] > 2
    before, after = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, run))
    return max(float((after[name] - weight).abs().max()) for name, weight in before.items())


def merged(root: Path, family: str, run: RunDir) -> list[float]:
    """The loss of a row by the base with the adapter, and by the exported model; and by the base alone."""
    write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
    spec = {"precision": "fp32", "check_prompts": 1, "model": {"model_name_or_path": str(root / family / "base")}}
    spec |= {"adapters": {str(run.adapter): 1.0}}
    target = lay_out(RunDir(root / family / "export"), ExportSpec.read(spec))
    export(target)
    adapted = PeftModel.from_pretrained(base_of(root, family), run.adapter)
    whole = AutoModelForImageTextToText.from_pretrained(target.model).float()
    return [loss_of(family, model, root) for model in (adapted, whole, base_of(root, family))]


def empty_part(root: Path, family: str, part: str) -> list[str]:
    """The fields of the problem with which an adapter is refused that has learned everything but this part."""
    spec = spec_of(root, family, **RUNS["adapters"])
    model = load_model(spec, str(root / family / "base"))
    for name, weight in model.named_parameters():
        if "lora_B" in name and model.structure.part_of(name_in_base(name)) != part:
            torch.nn.init.ones_(weight)
    try:
        save_weights(spec, model, root / f"without-{part}", root / "no-initial")
    except Refusal as refusal:
        return [problem.field for problem in refusal.problems]
    return []


def parts_of(family: str) -> dict[str, list[str]]:
    """What a model of the family is made of, without memory for its weights."""
    config, _ = zoo.tiny_config(family)
    with torch.device("meta"):
        structure = structure_of(zoo.model_class(family, config)(config))
    return {"vision": list(structure.vision), "projectors": list(structure.projectors)}


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_data(root)
    pictured = [row for row in read_json(root / "seen.json") if row["images"]]
    write_json(root / "pictured.json", pictured)
    write_json(root / "dataset_info.json", {name: {"file_name": f"{name}.json"} for name in ("seen", "pictured")})
    results: dict[str, Any] = {}
    for family in FAMILIES:
        write_model(family, root / family / "base")
        model = base_of(root, family)
        results[family] = {
            "names": {name: weight.numel() for name, weight in model.named_parameters()},
            "linear": [name for name, part in model.named_modules() if isinstance(part, nn.Linear)],
        }
        for name in RUNS_OF[family]:
            changes = RUNS[name]
            run = run_of(root, family, name, **changes)
            spec = spec_of(root, family, **changes)
            results[family][name] = learned(root, family, run) | {
                "planned": trained_parameters(spec), "modules": adapted_modules(spec),
                "rate": next(line["learning_rate"] for line in read_lines(run.metrics) if "learning_rate" in line),
            }  # fmt: skip
    family = FAMILIES[0]
    results["merged"] = merged(root, family, RunDir(root / family / "mixed"))
    results["empty"] = {part: empty_part(root, family, part) for part in ("tower", "projector", "nothing")}
    results["resumed"] = resumed(root, family, **RUNS["mixed"])
    results["parts"] = {name: parts_of(name) for name in OTHER_FAMILIES}
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
