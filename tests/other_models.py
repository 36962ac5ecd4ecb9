"""Models with towers, experts or states in every stage: `python -m tests.other_models FOLDER`.

One process that builds tiny models of some families, trains one in every stage, merges experts and writes answers; what
there is to compare is printed as one JSON object. Oracles are transformers' and peft's own classes.
"""

import json
import queue
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from engine.core.rundir import RunDir, read_lines, write_json
from engine.export.export_spec import ExportSpec
from engine.spec.run_spec import RunSpec
from engine.worker.evaluation.respond import LoadedModels
from engine.worker.export import export
from engine.worker.generation.answer import Answer
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.sampling import Sampling
from engine.worker.models.loading import load_model, save_weights
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests import tiny_reward_model, zoo
from tests.conftest import short_training
from tests.forked import fork_programs
from tests.train_many import lay_out

TOWERS, EXPERTS = "qwen3_vl", "qwen3_moe"
WRITERS = (TOWERS, "gemma3", EXPERTS, "mamba2", "openai-gpt")
SCORERS = ("bert", "ctrl", "gemma3", "gpt2", "llama4", "qwen3", "qwen3_vl", "xlnet")
ANSWERS_AND_PAIRS = {"sft": "chat", "pt": "text", "dpo": "pairs", "orpo": "pairs", "simpo": "pairs", "kto": "thumbs"}
ANSWERING = {"max_new_tokens": 4, "sample_steps": 1}
GRPO = {"rewards": ["format"], "reward_pattern": ".*[aeioustrn]", "num_generations": 4, "grpo_beta": 0.1}
TOKENS = 12


def write_data(folder: Path) -> None:
    questions = [f"What comes after {n}?" for n in range(16)]
    sets: dict[str, list[dict[str, Any]]] = {
        "chat": [{"instruction": text, "output": f"{n + 1}."} for n, text in enumerate(questions)],
        "text": [{"text": text * 4} for text in questions],
        "pairs": [{"instruction": text, "chosen": "aaa aaa", "rejected": "zz zz zz"} for text in questions],
        "thumbs": [{"instruction": text, "output": text, "label": n % 2 == 0} for n, text in enumerate(questions)],
    }
    columns = {
        "text": {"columns": {"prompt": "text"}},
        "pairs": {"ranking": True},
        "thumbs": {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}},
    }
    for name, rows in sets.items():
        write_json(folder / f"{name}.json", rows)
    write_json(folder / "dataset_info.json", {n: {"file_name": f"{n}.json"} | columns.get(n, {}) for n in sets})


class Trial:
    """Models and runs below one folder."""

    def __init__(self, root: Path):
        self.root = root
        write_data(root)

    def model(self, family: str) -> Path:
        folder = self.root / family / "base"
        return folder if folder.exists() else zoo.build(family, folder)

    def trained(self, family: str, name: str, data: str, /, **changes: Any) -> RunDir:
        spec = short_training(self.model(family), self.root, **{"training__max_steps": 2} | changes)
        run = lay_out(RunDir(self.root / family / name), spec.change("data.datasets", [data]))
        prepare(run)
        train(run)
        return run

    def judge(self, family: str) -> str:
        """A reward model of another family that reads the same tokens."""
        base = self.root / f"judge of {family}"
        zoo.build("qwen3", base)
        load_tokenizer(RunSpec(), str(self.model(family))).save_pretrained(base)
        tiny_reward_model.make(str(base), self.root / "judge")
        return str(self.root / "judge" / "adapter")

    def adapter(self, family: str) -> Path:
        """An adapter as if it had learned much."""
        base, folder = str(self.model(family)), self.root / family / "random" / "adapter"
        spec = RunSpec.read({"model": {"model_name_or_path": base}, "method": {"kind": "lora", "r": 4}})
        torch.manual_seed(1)
        model = load_model(spec, base)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        save_weights(spec, model, folder, folder / "none")
        load_tokenizer(spec, base).save_pretrained(folder)
        return folder


def adapter_of(run: RunDir) -> dict[str, Any]:
    """The first values of its curves, and where its adapter lies."""
    curves: dict[str, float] = {}
    for line in read_lines(run.metrics):
        curves = line | curves
    return {"curves": curves, "adapter": str(run.adapter)}


def every_stage(trial: Trial) -> dict[str, Any]:
    runs = {
        stage: trial.trained(TOWERS, stage, data, stage={"kind": stage}) for stage, data in ANSWERS_AND_PAIRS.items()
    }
    runs["grpo"] = trial.trained(TOWERS, "grpo", "chat", stage={"kind": "grpo", **ANSWERING, **GRPO})
    ppo = {"kind": "ppo", "reward_model": trial.judge(TOWERS), **ANSWERING}
    runs["ppo"] = trial.trained(TOWERS, "ppo", "chat", stage=ppo)
    full = {
        "stage": {"kind": "rm"},
        "method": {"kind": "full"},
        "training__learning_rate": 2e-3,
        "training__max_steps": 4,
    }
    scorer = trial.trained("gemma3", "rm", "pairs", **full)
    own = {"kind": "ppo", "reward_model": str(scorer.model), **ANSWERING}
    runs["ppo of gemma3 with its own reward model"] = trial.trained("gemma3", "ppo", "chat", stage=own)
    return {name: adapter_of(run) for name, run in runs.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20, 40)[None]).logits


def merged_experts(trial: Trial) -> dict[str, Any]:
    """How far the merged model is from base and adapter, and what the adapters on experts alone change."""
    run = trial.trained(EXPERTS, "experts", "chat", method__expert_r=2)
    weights = run.adapter / "adapter_model.safetensors"
    learned = load_file(weights)
    # Two steps are hardly to be seen: as if the experts had learned much.
    of_experts = {name: tensor for name, tensor in learned.items() if ".experts." in name and "lora_B" in name}
    without = logits_of(trial, run, learned | {name: tensor * 0 for name, tensor in of_experts.items()})
    torch.manual_seed(2)
    adapted = logits_of(trial, run, learned | {name: torch.randn_like(tensor) for name, tensor in of_experts.items()})
    spec = ExportSpec.read(
        {
            "model": {"model_name_or_path": str(trial.model(EXPERTS))},
            "adapters": {str(run.adapter): 1.0},
            "precision": "fp32",
            "check_prompts": 0,
            "prompts": ["What comes after 3?"],
        }
    )
    whole = lay_out(RunDir(trial.root / EXPERTS / "merged"), spec)
    export(whole)
    merged = logits(AutoModelForCausalLM.from_pretrained(whole.model))
    off, change = (float((adapted - other).abs().max()) for other in (merged, without))
    return {"off": off, "change": change, "adapter": str(run.adapter)}


def logits_of(trial: Trial, run: RunDir, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the base with these weights as the run's adapter, by peft."""
    save_file(weights, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trial.model(EXPERTS)), run.adapter))


def full_training_of_experts(trial: Trial) -> dict[str, Any]:
    """What the result of a whole model says of the router's loss, and whether transformers' `generate` writes with
    it."""
    run = trial.trained(EXPERTS, "full", "chat", method={"kind": "full"})
    model = AutoModelForCausalLM.from_pretrained(run.model)
    try:
        tokens = len(greedy(model, [20, 21, 22]))
    except RuntimeError:
        tokens = 0
    return {"asks": model.config.output_router_logits, "tokens": tokens}


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    end = {"eos_token_id": None, "pad_token_id": 0}
    written = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, **end
    )
    return written[0, len(prompt) :].tolist()


def answers(trial: Trial, family: str) -> dict[str, Any]:
    """Of base and adapter to three questions of different length: ours, and those of `generate`."""
    base, adapter = trial.model(family), trial.adapter(family)
    settings = short_training(base, trial.root).model
    loaded = LoadedModels.load(settings, str(base), {"adapter": str(adapter)}, "base", 4)
    questions = [[{"role": "user", "content": "Why? " * count}] for count in (1, 9, 4)]
    prompts = [loaded.models["base"].prompt(question) for question in questions]
    ours = {name: written(loaded, name, prompts) for name in ("base", "adapter")}
    loaded.end()
    auto = AutoModelForImageTextToText if family in (TOWERS, "gemma3") else AutoModelForCausalLM
    model = auto.from_pretrained(base)
    theirs = {"base": [greedy(model, prompt) for prompt in prompts]}
    adapted = PeftModel.from_pretrained(model, adapter)
    theirs["adapter"] = [greedy(adapted, prompt) for prompt in prompts]
    return {"ours": ours, "theirs": theirs}


def written(loaded: LoadedModels, name: str, prompts: list[list[int]]) -> list[list[int]]:
    model, ended = loaded.models[name], queue.SimpleQueue[str]()
    batch = [
        Answer(
            model.adapter, prompt, TOKENS, frozenset(), Sampling(0.0, 1.0), Detokenizer(model.backend_tokenizer),
            on_piece=lambda piece: ended.put(piece.finish) if piece.finish else None,
        )
        for prompt in prompts
    ]  # fmt: skip
    loaded.generator.submit_all(batch)
    assert {ended.get(timeout=300) for _ in prompts} == {"length"}
    return [answer.written for answer in batch]


def has_score(family: str) -> bool:
    """Whether transformers builds a model of the family with a matrix called "score"."""
    if family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return False
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family))
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def main(root: Path) -> None:
    trial = Trial(root)
    results = {
        "stages": every_stage(trial),
        "merged": merged_experts(trial),
        "full": full_training_of_experts(trial),
        "answers": {family: answers(trial, family) for family in WRITERS},
        "scorers": {family: has_score(family) for family in SCORERS},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    fork_programs()
    main(Path(sys.argv[1]))
