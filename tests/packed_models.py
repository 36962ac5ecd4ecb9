"""The tiny model as a GGUF file and as pickle files, honest and hostile: python -m tests.packed_models FOLDER TINY

gguf/model.Q8_0.gguf, written from what the format says, and gguf-plain, what its numbers mean; gguf-parts, the same in
several files; bin, with two files and
their index; pt, saved by a training script; and one folder for each pickle that must not be opened.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def q8_0(weight: Tensor) -> tuple[np.ndarray, Tensor]:
    """(bytes, what they mean): 32 numbers from -127 to 127 of a row, behind their factor in fp16."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    factors = (groups.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (groups / factors.float().clamp(min=1e-12)).round().clamp(-127, 127)
    stored = torch.cat([factors.view(torch.uint8), numbers.to(torch.int8).view(torch.uint8)], -1)
    meant = (numbers * factors.float()).reshape(weight.shape)
    return stored.reshape(*weight.shape[:-1], -1).numpy(), meant


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        return f"blk.{number}.{GGUF_NAMES[module]}.{kind}"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def write_gguf(tiny: Path, file: Path, tensors_per_file: int = 0) -> dict[str, Tensor]:
    """The model as a GGUF file, or several; returns the weights that it stands for."""
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    file.parent.mkdir()
    writer = GGUFWriter(file, "qwen2", split_max_tensors=tensors_per_file)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    added = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in added else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((tiny / "chat_template.jinja").read_text(encoding="utf-8"))
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(tiny / "model.safetensors").items():
        if weight.ndim == 2:
            stored, meant[name] = q8_0(weight.float())
            writer.add_tensor(gguf_name(name), stored, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            meant[name] = weight
            writer.add_tensor(gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def without_weights(tiny: Path, folder: Path) -> Path:
    return shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))


class RunsCode:
    """What a pickle holds that runs code as soon as it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def write_pickles(tiny: Path, root: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    folder = without_weights(tiny, root / "bin")
    names = sorted(weights)
    parts = {"pytorch_model-1.bin": names[: len(names) // 2], "pytorch_model-2.bin": names[len(names) // 2 :]}
    for file, inside in parts.items():
        torch.save({name: weights[name] for name in inside}, folder / file)
    places = {name: file for file, inside in parts.items() for name in inside}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    state = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({"epoch": 3, "model": state}, without_weights(tiny, root / "pt") / "last.pt")
    lacking = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    torch.save(lacking, without_weights(tiny, root / "lacking") / "pytorch_model.bin")
    hostile = {
        "hostile-torch": lambda file: torch.save(weights | {"x": RunsCode(root / "opened")}, file),
        "hostile-pickle": lambda file: file.write_bytes(pickle.dumps(RunsCode(root / "opened"), protocol=2)),
        "cut": lambda file: file.write_bytes((folder / "pytorch_model-1.bin").read_bytes()[:5000]),
        "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    }
    for name, write in hostile.items():
        write(without_weights(tiny, root / name) / "pytorch_model.bin")


def main(tiny: Path, root: Path) -> None:
    root.mkdir(exist_ok=True)
    meant = write_gguf(tiny, root / "gguf" / "model.Q8_0.gguf")
    write_gguf(tiny, root / "gguf-parts" / "model.gguf", tensors_per_file=10)
    shutil.copytree(tiny, plain := root / "gguf-plain")
    weights = {name: weight.bfloat16() for name, weight in meant.items()}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    write_pickles(tiny, root)


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[1]))
