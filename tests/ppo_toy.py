"""PPO on a toy reward: `python -m tests.ppo_toy STORY MODEL FOLDER [JSON of changes]` prints what came of it, as JSON.

The reward of an answer is the share of its tokens that are in a set of a tenth of the vocabulary, so that a model with
random weights begins at about a tenth. There is no reward model, no spec and no preparation: only the trainer is real.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from engine.core.rundir import RunDir, read_lines, write_json
from engine.spec.stage_settings import Ppo
from engine.worker.runtime.process_lifecycle import ProgressReport
from engine.worker.training.actor_critic import ActorCritic
from engine.worker.training.callbacks import RunCallback
from engine.worker.training.context import adjust_trainer
from engine.worker.training.ppo import CHECKPOINT_FILE, PpoTrainer


def share_of_wanted(_prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    return torch.tensor([sum(token % 10 == 3 for token in answer) / len(answer) for answer in answers])


def policy(model_path: str, method: str = "lora") -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    # Its own embeddings are so small that with them frozen no token could become much likelier than another.
    model.get_input_embeddings().weight.data *= 6
    if method == "full":
        return model
    start = method if method in ("pissa", "olora") else True
    return get_peft_model(
        model,
        LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            init_lora_weights=start,
            use_dora=method == "dora",
            modules_to_save=["lm_head"] if method == "head" else None,
            lora_dropout=0.1 if method == "dropout" else 0.0,
        ),
    )


def toy(model_path: str, folder: Path, model: Any = None, method: str = "lora", **changes: Any) -> PpoTrainer:
    """A trainer in the run folder `folder` that has not begun. `changes`: of Ppo's settings or of the arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    run = RunDir(folder)
    if not run.request.exists():
        write_json(run.request, {"attempt": 1, "stop": None})
    settings = {
        "max_new_tokens": 12,
        "init_kl_coef": 0.002,
        "sample_steps": 2,
        "missing_eos_penalty": None,
        "vf_coef": 0.5,
    }
    arguments = {
        "max_steps": 4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "seed": 0,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    settings |= {name: value for name, value in changes.items() if name in Ppo.model_fields}
    arguments |= {name: value for name, value in changes.items() if name not in Ppo.model_fields}
    set_seed(arguments["seed"])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    chats = [[{"role": "user", "content": "say " * (1 + number % 5)}] for number in range(128)]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    trainer = PpoTrainer(
        ActorCritic(model or policy(model_path, method)),
        Ppo(**settings),
        share_of_wanted,
        generation,
        run,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt_ids": prompts}),
        callbacks=[RunCallback(run, ProgressReport(run), keep=None)],
    )
    trainer.remove_callback(PrinterCallback)
    return adjust_trainer(trainer)


def learn(model_path: str, folder: Path, **changes: Any) -> Any:
    """Train; the lines of the curves."""
    toy(model_path, folder, **changes).train()
    return read_lines(RunDir(folder).metrics)


def begin(model_path: str, folder: Path) -> Any:
    """For each way a policy may begin: KL of its first answers, and how far the reference is from the bare base."""
    fresh = policy(model_path)
    for name, weight in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    fresh.save_pretrained(folder / "learned")
    told = {}
    for method in ("lora", "dropout", "dora", "pissa", "head", "full", "continued"):
        model = policy(model_path, "full" if method == "continued" else method)
        if method == "continued":
            model = PeftModel.from_pretrained(model, folder / "learned", is_trainable=True)
        trainer = toy(model_path, folder / method, model)
        rollout, figures = trainer.make_rollout(trainer.train_dataset["prompt_ids"][:8], step=1)
        texts = rollout.texts, rollout.attention, rollout.mask.shape[1], 1.0
        with torch.no_grad():
            reference = trainer.model.log_probs_and_entropy("reference", *texts)[0]
            trainer.model.roles["reference"] = (trainer.model.roles["critic"][0], None)
            bare = trainer.model.log_probs_and_entropy("reference", *texts)[0]
        told[method] = {"kl": figures["kl"], "from_base": (reference - bare).abs().max().item()}
    return told


class _CutOff(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def resume(model_path: str, folder: Path) -> Any:
    """Whether a run that was cut off and resumed ends as one that was not, and
    one with activation checkpointing, too."""
    told = {}
    for name, changes in {
        "lora": {},
        "full": {"method": "full"},
        "checkpointed": {"gradient_checkpointing": True},
    }.items():
        given = changes | {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_mini_batches": 2,
            "kl_target": 2.0,
            "kl_horizon": 200,
            "num_ppo_epochs": 2,
            "max_new_tokens": 6,
        }
        whole, broken = folder / name / "whole", folder / name / "broken"
        toy(model_path, whole, **given).train()
        cut = toy(model_path, broken, **given)
        cut.add_callback(_CutOff())
        try:
            cut.train()
        except KeyboardInterrupt:
            toy(model_path, broken, **given).train(resume_from_checkpoint=str(broken / "checkpoint-2"))
        told[name] = _alike(whole, broken)
    told["checkpointing"] = _alike(folder / "lora" / "whole", folder / "checkpointed" / "whole")
    return told


def _alike(one: Path, other: Path) -> Any:
    """The farthest that two runs' last weights are apart, their number, and which of them moved since step 2."""
    ends = [load_file(folder / "checkpoint-4" / CHECKPOINT_FILE) for folder in (one, other)]
    before = load_file(one / "checkpoint-2" / CHECKPOINT_FILE)
    assert ends[0].keys() == ends[1].keys()
    return {
        "apart": max((ends[0][name] - ends[1][name]).abs().max().item() for name in before),
        "moved": [name for name in before if not before[name].equal(ends[0][name])],
        "weights": len(before),
    }


def share(model_path: str, folder: Path, processes: int) -> Any:
    """One step on 16 prompts with answers that the prompts alone decide, shared among the processes; its figures."""
    places = torch.arange(1, 9)
    ActorCritic.generate_answers = lambda _, prompts, *given: (prompts.sum(1, keepdim=True) // 3 + 1) * places % 800
    given = {
        "per_device_train_batch_size": 16 // processes,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 1e9,
    }
    trainer = toy(model_path, folder, max_steps=1, kl_target=1.0, kl_horizon=100, save_steps=1, **given)
    trainer.train_dataset = trainer.train_dataset.select(range(16))
    trainer.train()
    return read_lines(RunDir(folder).metrics)[-1]


if __name__ == "__main__":
    story, model_path, folder, *changes = sys.argv[1:]
    stories = {"learn": learn, "begin": begin, "resume": resume, "share": share}
    print(json.dumps(stories[story](model_path, Path(folder), **json.loads(changes[0] if changes else "{}"))))
