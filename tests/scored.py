"""Scores of a reward model by hand, with nothing of ours:
`python -m tests.scored MODEL ADAPTER < conversations.json`."""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@torch.no_grad()
def main(model_path: str, adapter: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    model = PeftModel.from_pretrained(model, adapter).eval()
    told = []
    for conversation in json.load(sys.stdin):
        text = tokenizer.apply_chat_template(conversation, tokenize=False).rstrip("\n")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        told.append(model(input_ids=ids).logits.item())
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
