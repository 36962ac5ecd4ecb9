"""A finished reward-model run's result on the tiny model: `python -m tests.tiny_reward_model MODEL FOLDER`.

Its head is random, so its taste is arbitrary, but it is a taste: it scores by what a text says.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.rundir import RESULT, write_json
from engine.worker.scorer import Scorer

PAIRS = 24


def make(model_path: str, folder: Path) -> None:
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.name_or_path = model_path
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "score.modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.3)
    scorer = Scorer(model, tokenizer.pad_token_id)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say"}], add_generation_prompt=True, return_dict=False
    )
    answers = [[*row, tokenizer.eos_token_id] for row in torch.randint(3, 800, (2 * PAIRS, 6)).tolist()]
    ranked = sorted(zip(scorer([prompt] * len(answers), answers).tolist(), answers, strict=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad, "chosen_score": high, "rejected_score": low}
        for (low, bad), (high, good) in zip(ranked[:PAIRS], ranked[PAIRS:], strict=True)
    ]  # fmt: skip
    (folder / "evaluation_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_json(folder / "evaluation.json", {"accuracy": 1.0, "pairs": PAIRS})
    write_json(folder / RESULT, {"attempt": 1, "complete": True, "stage": "rm"})


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
