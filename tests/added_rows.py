"""Adapters of the tiny model with added tokens of their own, and one without, beside each other in one model as a chat
has them: python -m tests.added_rows TINY FOLDER

Prints, for each order of loading, how far the logits of each adapter are from those that transformers and peft compute
with that adapter alone; infinite where the number of tokens differs.
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.spec.run_spec import RunSpec
from engine.worker.generation.generator import Generator
from engine.worker.models.loading import load_base, load_model, save_weights

ROWS = 800
TOKENS = {"two": ["<1>", "<2>"], "three": ["<3>", "<4>", "<5>"], "none": []}


def make(tiny: str, folder: Path, name: str) -> None:
    settings = {"model_name_or_path": tiny, "add_tokens": TOKENS[name]}
    spec = RunSpec.read({"model": settings, "method": {"kind": "lora", "r": 4}, "data": {"datasets": ["x"]}})
    torch.manual_seed(len(TOKENS[name]))
    model = load_model(spec, tiny)
    for path, weight in model.named_parameters():
        if "lora_B" in path or "tokens_delta" in path:
            torch.nn.init.normal_(weight, std=0.3)
    (folder / name).mkdir(parents=True)
    save_weights(spec, model, folder / name, folder / "initial")


def ids(name: str) -> Tensor:
    return torch.arange(ROWS - 10, ROWS + len(TOKENS[name]))[None]


@torch.inference_mode()
def alone(tiny: str, folder: Path, name: str) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + len(TOKENS[name]), mean_resizing=False)
    return PeftModel.from_pretrained(model, folder / name).eval()(ids(name)).logits


@torch.inference_mode()
def together(generator: Generator, folder: Path, name: str) -> Tensor:
    generator.use(str(folder / name))
    adapted: Any = generator.adapted
    return adapted(ids(name)).logits


def main(tiny: str, folder: Path) -> None:
    for name in TOKENS:
        make(tiny, folder, name)
    expected = {name: alone(tiny, folder, name) for name in TOKENS}
    far = {}
    for order in itertools.permutations(TOKENS):
        spec = RunSpec.read({"model": {"model_name_or_path": tiny}})
        generator = Generator(load_base(spec, tiny, torch.float32).eval())
        for name in order:
            generator.call(partial(generator.load_adapter, str(folder / name))).result()
        for name in order:
            logits = generator.call(partial(together, generator, folder, name)).result()
            same = logits.shape == expected[name].shape
            far[" ".join((*order, name))] = float((logits - expected[name]).abs().max()) if same else float("inf")
        generator.end()
    print("\n" + json.dumps(far))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
