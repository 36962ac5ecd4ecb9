"""Whether packed examples are alone: prints the losses of two batches that hold the same rows, one of them packed.

`python -m tests.packed_alike MODEL`
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

ROWS = [[5, 9, 100, 7, 300, 42], [11, 12, 13, 14], [700, 20, 60, 61, 62, 63, 64, 65]]


def main(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    plain = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    together = [token for ids in ROWS for token in ids]
    labels = [label for ids in ROWS for label in (-100, *ids[1:])]
    packed = [{"input_ids": together, "labels": labels, "seq_lengths": [len(ids) for ids in ROWS]}]
    blind = [{"input_ids": together, "labels": labels}]
    told = {}
    for name, rows, free in (("plain", plain, False), ("packed", packed, True), ("one_text", blind, False)):
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)(rows)
        with torch.no_grad():
            told[name] = model(**batch, use_cache=False).loss.item()  # as the trainer calls it
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
