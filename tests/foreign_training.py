"""Leave the folder that LLaMA-Factory 0.9 leaves of a LoRA training: `python -m tests.foreign_training FOLDER MODEL`.

The same libraries write the same files by the same calls as in its workflow for SFT; its own two files, the log and
LLaMA Board's settings, are written here in its format. Prints a greedy answer of the base model and of the trained one.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

STEPS = 8
SECONDS_PER_STEP = 10  # as the log claims
QUESTION = "What comes after 3?"


class LogCallback(TrainerCallback):
    """Its line for each entry that the trainer has logged."""

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        last, done, seconds = state.log_history[-1], state.global_step, SECONDS_PER_STEP * state.global_step
        line = {
            "current_steps": done,
            "total_steps": state.max_steps,
            "loss": last.get("loss"),
            "eval_loss": last.get("eval_loss"),
            "predict_loss": last.get("predict_loss"),
            "reward": last.get("reward"),
            "accuracy": last.get("rewards/accuracies"),
            "lr": last.get("learning_rate"),
            "epoch": last.get("epoch"),
            "percentage": round(done / state.max_steps * 100, 2),
            "elapsed_time": str(timedelta(seconds=seconds)),
            "remaining_time": str(timedelta(seconds=SECONDS_PER_STEP * (state.max_steps - done))),
        }
        with Path(args.output_dir, "trainer_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: value for name, value in line.items() if value is not None}) + "\n")


def settings(folder: Path, model: Path) -> dict[str, Any]:
    """What LLaMA Board writes into training_args.yaml."""
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": str(model), "preprocessing_num_workers": 16,
        "finetuning_type": "lora", "template": "qwen", "flash_attn": "auto", "dataset_dir": "data",
        "dataset": "chat", "cutoff_len": 64, "learning_rate": 0.005, "num_train_epochs": 1.0, "max_steps": STEPS,
        "max_samples": 100000, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "logging_steps": 1, "save_steps": 4, "warmup_steps": 0,
        "packing": False, "report_to": "none", "output_dir": str(folder), "plot_loss": True, "optim": "adamw_torch",
        "ddp_timeout": 180000000, "include_num_input_tokens_seen": True, "lora_rank": 4, "lora_alpha": 8,
        "lora_dropout": 0, "lora_target": "all", "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 4,
    }  # fmt: skip


def rows(tokenizer: Any) -> list[dict[str, Any]]:
    chats = [f"What comes after {n}?<|im_end|>\n<|im_start|>assistant\n{n + 1}.<|im_end|>" for n in range(16)]
    texts = [f"<|im_start|>user\n{chat}" for chat in chats]
    tokens = tokenizer(texts, padding="max_length", max_length=48, truncation=True)["input_ids"]
    padding = tokenizer.pad_token_id
    return [{"input_ids": ids, "labels": [-100 if id == padding else id for id in ids]} for ids in tokens]


def train(folder: Path, path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=0.05, per_device_train_batch_size=2, logging_steps=1, save_steps=4,
        eval_strategy="steps", eval_steps=4, lr_scheduler_type="cosine", report_to="none", use_cpu=True,
        include_num_input_tokens_seen="all", disable_tqdm=True,
    )  # fmt: skip
    data = rows(tokenizer)
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:4], processing_class=tokenizer,
        callbacks=[LogCallback()],
    )  # fmt: skip
    done = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", done.metrics)
    trainer.save_metrics("train", done.metrics)
    trainer.save_state()
    trainer.create_model_card(
        license="other", tasks="text-generation", finetuned_from=str(path), tags=["llama-factory", "lora"],
        dataset=["chat", "text"],
    )  # fmt: skip
    (folder / "training_args.yaml").write_text(yaml.safe_dump(settings(folder, path)), encoding="utf-8")
    with model.disable_adapter():
        before = answer(model, tokenizer)
    return before, answer(model, tokenizer)


def answer(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answered = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=0)
    return tokenizer.decode(answered[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    print(json.dumps(train(Path(sys.argv[1]), Path(sys.argv[2]))))
