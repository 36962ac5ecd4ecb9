"""Finished runs with an adapter each, without having been trained: `python -m tests.tiny_adapter SAVES MODEL NAME…`.

The adapters are random, each its own way and strong enough to be heard, so what the model says with one is not what
it says without.
"""

import sys
import time
from pathlib import Path

import torch

from engine.core.rundir import RESULT_FILE, RunDir, write_json, write_text
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_model, save_weights
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.training.result import generation_config


def make(model_path: str, folder: Path, seed: int) -> None:
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    spec = RunSpec.read(
        {
            "name": folder.name,
            "model": {"model_name_or_path": model_path},
            "method": {"kind": "lora", "r": 4},
            "data": {"datasets": ["chat"]},
        }
    )
    torch.manual_seed(seed)
    tokenizer, model = load_tokenizer(spec, model_path), load_model(spec, model_path)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_weights(spec, model, run.adapter, run.initial)
    tokenizer.save_pretrained(run.adapter)
    generation_config(spec, model, tokenizer).save_pretrained(run.adapter)
    write_json(run.adapter / RESULT_FILE, {"attempt": 1, "complete": True, "stage": "sft"})
    write_text(run.spec, spec.to_yaml())
    write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": time.time()})
    write_json(run.request, {"by": "", "submitted": float(seed), "attempt": 1, "stop": None})


if __name__ == "__main__":
    for number, name in enumerate(sys.argv[3:], start=1):
        make(sys.argv[2], Path(sys.argv[1]) / "demo_model" / "lora" / name, number)
