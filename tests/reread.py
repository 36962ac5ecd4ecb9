"""Results of runs as whoever uses them finds them, in a process that has not trained: `python -m tests.reread FOLDER …`

Each folder is a run's adapter/ or model/. Prints, as JSON, one object per folder: of a reward model the scores of its
evaluation pairs, of others the summed log-probability of each answer in prepared/validation.arrow, and of the base's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.core.rundir import RunDir, read_json, read_lines
from engine.worker.models.reward_model import load_reward_model, score_conversations
from tests.judged import log_probability

SIDES = ("chosen", "rejected")


def reread(folder: Path) -> dict[str, Any]:
    if read_json(folder / "result.json")["stage"] == "rm":
        model, _ = load_reward_model(folder)
        pairs = read_lines(folder / "evaluation_pairs.jsonl")
        return {
            side: score_conversations(model, [one["prompt_ids"] + one[f"{side}_ids"] for one in pairs]).tolist()
            for side in SIDES
        }
    base = read_json(folder / "result.json")["base"]
    model = AutoModelForCausalLM.from_pretrained(base if folder.name == "adapter" else folder)
    if folder.name == "adapter":
        model = PeftModel.from_pretrained(model, folder)
    before = AutoModelForCausalLM.from_pretrained(base)
    told = {}
    for row in Dataset.from_file(str(RunDir(folder.parent).prepared / "validation.arrow")):
        answers = (
            {side: row[f"{side}_ids"] for side in SIDES}
            if "chosen_ids" in row
            else {"chosen" if row["label"] else "rejected": row["completion_ids"]}
        )
        for side, ids in answers.items():
            told.setdefault(side, []).append(log_probability(model, row["prompt_ids"], ids))
            told.setdefault(f"{side} before", []).append(log_probability(before, row["prompt_ids"], ids))
            told.setdefault(f"{side} tokens", []).append(len(ids))
    return told


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps([reread(Path(folder)) for folder in sys.argv[1:]]))
