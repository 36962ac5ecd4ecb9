"""Greedy answers of a model, and of it with each adapter: `python -m tests.ask MODEL ADAPTER|-… < rows.json`.

Prints for each, as a line of JSON, the answers to the alpaca rows on standard
input and the share that is exact. Everything about the chat is taken from the
folder of the adapter (or of the model), as whoever uses the result would take it.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def asked(model_path: str, adapter: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    folder = model_path if adapter == "-" else adapter
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    if adapter != "-":
        model = PeftModel.from_pretrained(model, adapter)
    chats = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    config = GenerationConfig.from_pretrained(folder)
    with torch.no_grad():
        answered = model.generate(**prompts, generation_config=config, max_new_tokens=40, do_sample=False)
    answers = tokenizer.batch_decode(answered[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    exact = sum(answer == row["output"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
    return {"exact": exact, "answers": answers}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for one in sys.argv[2:]:
        print(json.dumps(asked(sys.argv[1], one, given), ensure_ascii=False))
