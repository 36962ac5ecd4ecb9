"""Load, train and export models with quantized weights in one process: python -m tests.quantized_runs MODELS SAVES

Prints as JSON, for each kind: how far the loaded weights are from those that were meant, the names of the tensors that
a whole model is saved with, and where the results are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.core.rundir import RunDir, write_json, write_text
from engine.export.export_spec import ExportSpec
from engine.models.facts import inspect_model
from engine.preflight.model_checks import trained_parameters
from engine.spec.run_spec import RunSpec
from engine.worker.export import export
from engine.worker.models.loading import load_base, load_model
from engine.worker.prepare import prepare
from engine.worker.runtime.process_lifecycle import run_lifecycle
from engine.worker.train import train
from tests.conftest import short_training
from tests.train_many import lay_out

TRAINED = {"fp8": {"method__r": 4}, "mxfp4": {"method__r": 4, "method__expert_r": 2}, "int4": {"method__r": 4}}


def load(models: Path, kind: str) -> dict[str, Any]:
    """What the weights are in memory, and what a whole model is saved as."""
    spec = RunSpec.read(
        {"model": {"model_name_or_path": str(models / kind)}, "method": "full", "data": {"datasets": ["x"]}}
    )
    model: Any = load_base(spec, str(models / kind), torch.float32)
    meant = load_file(models / f"{kind}-plain" / "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/model.safetensors")
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    counted = load_model(spec, str(models / kind))  # which asserts that the plan is right
    return {
        "names": sorted(saved) == sorted(meant),
        "far": max(
            float((saved[name] - weight.float()).abs().max()) for name, weight in meant.items() if name in saved
        ),
        "quantization_config": config.get("quantization_config"),
        "trained": sum(weight.numel() for weight in counted.parameters() if weight.requires_grad),
        "planned": trained_parameters(spec),
        "parameters": inspect_model(models / kind).parameters,
    }


def train_and_export(models: Path, kind: str, saves: Path) -> None:
    spec = short_training(models / kind, saves.parent / "data", **TRAINED[kind], training__max_steps=4)
    run = lay_out(RunDir(saves / kind / "lora" / kind), spec)
    with run_lifecycle(str(run.path)):
        prepare(run)
        train(run)
    merged = RunDir(saves / kind / "export" / kind)
    merged.path.mkdir(parents=True)
    base = {"model_name_or_path": str(models / kind)}
    settings = {"model": base, "adapters": {str(run.adapter): 1.0}, "precision": "fp32", "check_prompts": 2}
    write_text(merged.spec, ExportSpec.read(settings).to_yaml())
    write_json(merged.request, {"kind": "export", "by": "", "submitted": 2.0, "attempt": 1, "stop": None})
    export(merged)


def main(models: Path, saves: Path) -> None:
    report = {kind: load(models, kind) for kind in ("fp8", "fp8-experts", "mxfp4", "int4", "float8")}
    for kind in TRAINED:
        train_and_export(models, kind, saves)
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
