"""Train layers of a model whose frozen weights are in bf16, in every stage: `python -m tests.freeze_runs FOLDER`.

Each run is done twice: on a model in bf16, and on the same one with its files in fp32, whose frozen weights are kept in
fp32. What there is to compare is printed as one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, TrainerCallback, trainer

from engine.core.rundir import RunDir, read_lines
from engine.models.facts import inspect_model
from engine.preflight.memory import memory_needed
from engine.worker.generation.generator import Batch
from engine.worker.models.loading import load_model
from tests import zoo
from tests.conftest import short_training
from tests.other_models import ANSWERING, GRPO, Trial

LAST_LAYER = {"kind": "freeze", "trainable_layers": 1}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {"data": "text"}, "sft": {"data": "chat", "logging__probe": True}, "rm": {"data": "pairs"},
    "dpo": {"data": "pairs"}, "kto": {"data": "thumbs"}, "orpo": {"data": "pairs"}, "simpo": {"data": "pairs"},
}  # fmt: skip
MODULES = {
    "layer": LAST_LAYER, "first layer": {"kind": "freeze", "trainable_layers": -1},
    "head": {"kind": "freeze", "trainable_modules": ["lm_head"]},
    "norm": {"kind": "freeze", "trainable_modules": ["model.norm"]},
    "embeddings": {"kind": "freeze", "trainable_modules": ["model.embed_tokens"]},
    "attention": {"kind": "freeze", "trainable_modules": ["model.layers.0.self_attn"]},
}  # fmt: skip
HELD: dict[str, int] = {}


class Observer(TrainerCallback):
    """What the training of this process holds when it takes a step, in bytes."""

    def on_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        HELD["weights"] = bytes_of(model.parameters())
        HELD["learning"] = bytes_of([*gradients, *(value for value in states if torch.is_tensor(value))])


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def models(root: Path) -> dict[str, Path]:
    """The same tiny model twice, its values exact in bf16."""
    zoo.build("qwen3", root / "bf16" / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "bf16" / "base", dtype=torch.bfloat16)
    model.save_pretrained(root / "bf16" / "base")
    zoo.build("qwen3", root / "fp32" / "base")
    model.float().save_pretrained(root / "fp32" / "base")
    return {name: root / name / "base" for name in ("bf16", "fp32")}


def curve(run: RunDir) -> list[dict[str, float]]:
    names = ("loss", "eval_loss", "grad_norm", "reward", "kl")
    return [{name: line[name] for name in names if name in line} for line in read_lines(run.metrics)]


def changed(base: Path, run: RunDir) -> dict[str, Any]:
    """The types of the saved weights, those that differ from the base, and the type in the configuration."""
    before, after = load_file(base / "model.safetensors"), load_file(run.model / "model.safetensors")
    config = json.loads((run.model / "config.json").read_text(encoding="utf-8"))
    return {
        "types": sorted({str(tensor.dtype) for tensor in after.values()}), "config": config["dtype"],
        "names": sorted(after) == sorted(before),
        "changed": sorted(name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name])),
    }  # fmt: skip


def every_stage(trial: Trial, base: Path, judge: str) -> dict[str, Any]:
    report: dict[str, Any] = {}
    name = base.parent.name
    common = {"training__precision": "bf16", "method": LAST_LAYER, "training__max_steps": 3}
    for stage, settings in STAGES.items():
        changes = common | {"stage": {"kind": stage}, "data__validation_share": 0.25, "logging__eval_steps": 2}
        changes |= {key: value for key, value in settings.items() if key != "data"}
        changes["logging__eval_strategy"] = "steps"
        run = trial.trained(name, stage, settings["data"], **changes)
        report[stage] = {"curve": curve(run), "held": dict(HELD), "probe": run.probe.exists()}
        report[stage] |= {} if stage == "rm" else changed(base, run)
    answering = {
        "grpo": {"kind": "grpo", **ANSWERING, **GRPO},
        "ppo": {"kind": "ppo", "reward_model": judge, **ANSWERING},
    }
    for stage, settings in answering.items():
        run = trial.trained(name, stage, "chat", stage=settings, **common)
        report[stage] = {"curve": curve(run), **changed(base, run)}
    return report


def estimated(trial: Trial, base: Path) -> dict[str, float]:
    spec = short_training(base, trial.root, method=LAST_LAYER, training__precision="bf16")
    need = memory_needed(spec, inspect_model(base), gpu_count=0)
    assert need is not None
    return {"weights": need.weights, "learning": need.learning}


def alone(trial: Trial, base: Path) -> dict[str, Any]:
    """Logits without a trainer, whatever is trained, and the types of the weights."""
    report = {}
    for name, method in MODULES.items():
        spec = short_training(base, trial.root, method=method, training__precision="bf16")
        model: Any = load_model(spec, str(base))
        batch = Batch(model.eval(), None)
        with torch.no_grad():
            logits = batch._read(torch.arange(20, 40)[None], torch.ones(1, 20, dtype=torch.long), None)
        trained = {str(weight.dtype) for weight in model.parameters() if weight.requires_grad}
        frozen = {str(weight.dtype) for weight in model.parameters() if not weight.requires_grad}
        report[name] = {"logits": logits[0].tolist(), "trained": sorted(trained), "frozen": sorted(frozen)}
    return report


def frozen_tower(trial: Trial) -> dict[str, Any]:
    """The types of language part and tower in full training, and bytes of the weights as estimated and held."""
    base = zoo.build("qwen3_vl", trial.root / "sees" / "base")
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    spec = short_training(base, trial.root, method="full", training__precision="bf16")
    model: Any = load_model(spec, str(base))
    need = memory_needed(spec, inspect_model(base), gpu_count=0)
    assert need is not None
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20, 40)[None], attention_mask=torch.ones(1, 20, dtype=torch.long)).logits
    types = {"tower": set[str](), "language": set[str]()}
    for name, weight in model.named_parameters():
        types["tower" if model.structure.is_in_tower(name) else "language"].add(str(weight.dtype))
    return {name: sorted(kinds) for name, kinds in types.items()} | {
        "estimated": need.weights, "held": bytes_of(model.parameters()), "finite": bool(logits.isfinite().all()),
    }  # fmt: skip


def main(root: Path) -> None:
    trainer.DEFAULT_CALLBACKS.append(Observer)
    root.mkdir(exist_ok=True)
    trial = Trial(root)
    bases = models(root)
    judge = trial.judge("bf16")
    print("\n" + json.dumps({
        "stages": {name: every_stage(trial, base, judge) for name, base in bases.items()},
        "estimated": {name: estimated(trial, base) for name, base in bases.items()},
        "alone": {name: alone(trial, base) for name, base in bases.items()},
        "frozen tower": frozen_tower(trial),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
