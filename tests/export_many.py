"""Results of every kind without training, and exports of them, in one process:
`python -m tests.export_many MODEL SAVES`.

Each result is random, but strong enough to be heard. Prints as JSON what each export says of itself. What is tested
here is the worker alone; that it is started, queued and ended as a run is tested elsewhere.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_json, write_json, write_text
from engine.export.export_spec import ExportSpec
from engine.spec.run_spec import RunSpec
from engine.worker.export import export
from engine.worker.models.loading import keep_initial, load_base, load_model, save_weights
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.training.result import generation_config

LORA = {"kind": "lora", "r": 4}
RESULTS: dict[str, dict[str, Any]] = {
    "plain": {"method": LORA},
    "other": {"method": LORA | {"r": 6}},
    "dora": {"method": LORA | {"use_dora": True}},
    "rslora": {"method": LORA | {"use_rslora": True}},
    "pissa": {"method": LORA | {"init_lora_weights": "pissa"}},
    "olora": {"method": LORA | {"init_lora_weights": "olora"}},
    "head": {"method": LORA | {"modules_to_save": ["lm_head"]}},
    "embeddings": {"method": LORA | {"modules_to_save": ["embed_tokens"]}},
    "judge": {"method": LORA, "stage": "rm"},
    "full": {"method": "full", "strong": 0.1},
    "huge": {"method": LORA, "strong": 1e5},
    "broken": {"method": LORA, "strong": float("nan")},
    "templated": {"method": LORA, "template": "alpaca"},
}
EXPORTS: dict[str, dict[str, Any]] = {
    **{name: {"of": [name]} for name in RESULTS if name not in ("huge", "broken", "full")},
    "vocabulary": {"of": ["vocabulary"]},
    "half": {"of": ["plain"], "precision": "bf16"},
    "overflow": {"of": ["huge"], "precision": "fp16"},
    "nan": {"of": ["broken"]},
    "whole": {"of": ["full"], "precision": "fp16", "shard_gb": 0.0002},
    "alone": {"of": ["plain"], "form": "adapter"},
    "sum": {"of": {"plain": 1.0, "rslora": -0.5, "other": 0.25}},
    "squeezed": {"of": ["plain", "rslora"], "combination": "svd", "form": "adapter", "svd_rank": 3},
    "doubled": {"of": {"plain": 2.0}},
    "4bit": {"of": ["plain"], "quantize": "4bit"},
    "8bit": {"of": ["plain"], "quantize": "8bit"},
}


def make(model_path: str, run: RunDir, seed: int, about: dict[str, Any]) -> None:
    """A finished run as its training would have left it."""
    spec = RunSpec.read(
        {
            "name": run.path.name,
            "model": {"model_name_or_path": model_path, "chat_template": about.get("template")},
            "data": {"datasets": ["alpaca_translate_zh"], "dataset_dir": "data"},
            "method": about["method"],
            "stage": about.get("stage", "sft"),
        }
    )
    torch.manual_seed(seed)
    tokenizer, model = load_tokenizer(spec, model_path), load_model(spec, model_path)
    keep_initial(spec, model, run.initial)
    disturb(model, about.get("strong", 0.3))
    left = run.adapter if spec.method.kind == "lora" else run.model
    left.mkdir(parents=True)
    save_weights(spec, model, left, run.initial)
    finish(run, spec, left, model, tokenizer)


def disturb(model: Any, strong: float) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += strong * torch.randn_like(weight) * (1 if "lora_B" in name else 0.1)
            if "magnitude" in name:
                weight.data *= 8  # the tiny model's own are too small to be heard


def make_with_words(model_path: str, run: RunDir) -> None:
    """An adapter of somebody who added words to the vocabulary first."""
    spec = RunSpec.read(
        {"name": "vocabulary", "model": {"model_name_or_path": model_path}, "data": {"datasets": ["x"]}}
    )
    tokenizer, model = load_tokenizer(spec, model_path), load_base(spec, model_path, torch.float32)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = ["embed_tokens", "lm_head"]
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=whole)
    )
    disturb(model, 0.3)
    run.adapter.mkdir(parents=True)
    save_weights(spec, model, run.adapter, run.initial)
    finish(run, spec, run.adapter, model, tokenizer)


def finish(run: RunDir, spec: RunSpec, left: Path, model: Any, tokenizer: Any) -> None:
    tokenizer.save_pretrained(left)
    if spec.stage.kind != "rm":
        generation_config(spec, model, tokenizer).save_pretrained(left)
    write_json(left / RESULT_FILE, {"attempt": 1, "complete": True, "stage": spec.stage.kind})
    write_text(run.spec, spec.to_yaml())
    write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
    write_json(run.request, {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})


def begin(model_path: str, saves: Path, name: str, about: dict[str, Any]) -> RunDir:
    """The folder of an export as it is when its worker starts."""
    run = RunDir(saves / "tiny" / "export" / name)
    run.path.mkdir(parents=True)
    given = {key: value for key, value in about.items() if key != "of"}
    names = about["of"] if isinstance(about["of"], dict) else dict.fromkeys(about["of"], 1.0)
    folder = saves / "tiny" / "lora"
    base, adapters = model_path, {str(folder / one / "adapter"): weight for one, weight in names.items()}
    if "full" in names:
        base, adapters = str(folder / "full" / "model"), {}
    spec = {
        "precision": "fp32",
        "check_prompts": 12,
        "model": {"model_name_or_path": base},
        "adapters": adapters,
    }
    write_text(run.spec, ExportSpec.read(spec | given).to_yaml())
    write_json(run.request, {"kind": "export", "by": "", "submitted": 2.0, "attempt": 1, "stop": None})
    return run


def main(model_path: str, saves: Path) -> None:
    for seed, (name, about) in enumerate(RESULTS.items()):
        make(model_path, RunDir(saves / "tiny" / "lora" / name), seed, about)
    make_with_words(model_path, RunDir(saves / "tiny" / "lora" / "vocabulary"))
    told = {}
    for name, about in EXPORTS.items():
        run = begin(model_path, saves, name, about)
        try:
            export(run)
            write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 3.0})
            told[name] = read_json(run.left() / "comparison.json")
        except Refusal as refusal:
            told[name] = {"refused": [one.code for one in refusal.problems]}
        except Exception:
            told[name] = {"failed": traceback.format_exc()}
    print("\n" + json.dumps(told, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
