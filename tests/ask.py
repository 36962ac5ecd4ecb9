"""Greedy answers of a model, with or without an adapter: `python -m tests.ask MODEL ADAPTER|- < rows.json`.

Prints the share of alpaca rows on standard input whose output is answered exactly, as JSON. Everything about the
chat is taken from the folder of the adapter (or of the model), as whoever uses the result would take it.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main(model_path: str, adapter: str) -> None:
    rows = json.load(sys.stdin)
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
    print(json.dumps({"exact": exact, "answers": answers}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
