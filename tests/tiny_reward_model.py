"""A finished reward model of the tiny model, without having been trained:
`python -m tests.tiny_reward_model MODEL FOLDER`.

FOLDER becomes a run's folder with its result in adapter/. The adapter and the head are random, so its taste is
arbitrary, but it is a taste: it scores by what a text says. Its held-out pairs are answers as it ranks them.
"""

import json
import sys
from pathlib import Path

import torch

from engine.core.rundir import RESULT_FILE, RunDir, write_json, write_text
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_model, save_weights
from engine.worker.models.reward_model import score_conversations
from engine.worker.models.tokenizer import load_tokenizer

PAIRS = 24


def make(model_path: str, folder: Path) -> None:
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    spec = RunSpec.read(
        {"stage": "rm", "model": {"model_name_or_path": model_path}, "method": {"kind": "lora", "r": 4}}
    )
    write_text(run.spec, spec.to_yaml())
    torch.manual_seed(1)
    tokenizer = load_tokenizer(spec, model_path)
    model = load_model(spec, model_path)
    model.config.pad_token_id = tokenizer.pad_token_id
    for name, weight in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(weight, std=0.3)
    chat = [{"role": "user", "content": "say"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answers = [[*row, tokenizer.eos_token_id] for row in torch.randint(3, 800, (2 * PAIRS, 6)).tolist()]
    told = score_conversations(model.eval(), [prompt + answer for answer in answers]).tolist()
    ranked = sorted(zip(told, answers, strict=True))
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad, "chosen_score": high, "rejected_score": low}
        for (low, bad), (high, good) in zip(ranked[:PAIRS], ranked[PAIRS:], strict=True)
    ]
    save_weights(spec, model, run.adapter, run.initial)
    tokenizer.save_pretrained(run.adapter)
    write_text(run.adapter / "evaluation_pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    write_json(run.adapter / "evaluation.json", {"accuracy": 1.0, "pairs": PAIRS})
    write_json(run.adapter / RESULT_FILE, {"attempt": 1, "complete": True, "stage": "rm"})


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
