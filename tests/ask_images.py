"""Greedy answers about images: `python -m tests.ask_images MODEL ADAPTER|-… < rows.json`, with paths of the images.

Prints for each adapter, or the model alone, the share of exact answers as a line of JSON. The prompt is put together
here, for Qwen2-VL's family, and the pixels come from transformers' own image processor.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

IMAGE = "<|image_pad|>"


def exact_share(model_path: str, adapter: str, rows: list[dict[str, Any]]) -> float:
    tokenizer, processor = (kind.from_pretrained(model_path) for kind in (AutoTokenizer, AutoImageProcessor))
    model: Any = AutoModelForImageTextToText.from_pretrained(model_path)
    if adapter != "-":
        model = PeftModel.from_pretrained(model, adapter)
    pixels = processor([Image.open(row["images"][0]).convert("RGB") for row in rows], return_tensors="pt")
    prompts = []
    for row, grid in zip(rows, pixels["image_grid_thw"], strict=True):
        image = f"<|vision_start|>{IMAGE * (int(grid.prod()) // 4)}<|vision_end|>"
        question = row["instruction"].replace("<image>", image)
        prompts.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"]  # pictures of one size: prompts of one length
    types = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int()
    with torch.no_grad():
        answers = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels, max_new_tokens=12,
            do_sample=False,
        )  # fmt: skip
    texts = tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(text == row["output"] for text, row in zip(texts, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    questions = json.load(sys.stdin)
    for folder in sys.argv[2:]:
        print(json.dumps(exact_share(sys.argv[1], folder, questions)))
