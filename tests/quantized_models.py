"""Tiny models with quantized weights, and the plain ones that they stand for: python -m tests.quantized_models FOLDER

Each kind is FOLDER/<kind>, the plain one FOLDER/<kind>-plain. Quantized here by hand from what the formats say, so that
whatever reads them can be compared with the numbers that were meant.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests import tiny_model

Quantizer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # weight → what is stored of it, and what that means
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIZES: dict[str, Any] = {
    "vocab_size": 800,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As DeepSeek-V3's: float8 in blocks of 128 × 128, the last of which may be cut off, with a factor for each."""
    rows, columns = weight.shape
    stored, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    factors = torch.empty(-(-rows // 128), -(-columns // 128))
    for row in range(0, rows, 128):
        for column in range(0, columns, 128):
            part = (slice(row, row + 128), slice(column, column + 128))
            factor = weight[part].abs().max() / 448
            stored[part] = (weight[part] / factor).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * factor
            factors[row // 128, column // 128] = factor
    return {"weight": stored, "weight_scale_inv": factors}, meant


def fp8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' float-quantized: float8 with a factor for each row."""
    factors = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (weight / factors.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    meant = stored.float() * factors.float()
    return {"weight": stored, "weight_scale": factors}, meant.bfloat16().float()  # in the type of the factors


def packed_int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' pack-quantized: eight numbers of 4 bits in an int32, with a factor for each 32 of a row."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, 32)
    factors = (groups.abs().amax(2) / 7).bfloat16()
    numbers = (groups / factors.float()[..., None]).round().clamp(-8, 7).to(torch.int64)
    meant = (numbers.float() * factors.float()[..., None]).reshape(rows, columns).bfloat16().float()
    words = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for place in range(8):
        words |= (numbers.reshape(rows, -1, 8)[..., place] + 8) << (4 * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return {"weight_packed": words, "weight_scale": factors, "weight_shape": torch.tensor([rows, columns])}, meant


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As gpt-oss has its experts: (blocks, scales, what they mean) of a tensor of (experts, outputs, inputs). Two
    numbers of 4 bits in a byte, the first in its low half, with a power of two for each 32 of a row."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = groups.abs().amax(-1).clamp(min=1e-20).log2().floor() - 2
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    meant = E2M1[codes] * scaled.sign() * exponents.exp2()[..., None]
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponents + 127).to(torch.uint8), meant.reshape(weight.shape)


def grouped_int4(weight: Tensor, groups: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, zeros, scales) of (inputs, outputs), (groups, outputs), (groups, outputs)."""
    columns = weight.T.numpy()
    number = int(groups.max()) + 1
    scales, zeros = np.empty((number, columns.shape[1]), np.float16), np.empty((number, columns.shape[1]), np.int64)
    numbers = np.empty(columns.shape, np.int64)
    for group in range(number):
        rows = np.flatnonzero(groups.numpy() == group)
        low, high = columns[rows].min(0), columns[rows].max(0)
        scales[group] = (high - low) / 15
        zeros[group] = np.clip(np.round(-low / scales[group].astype(np.float32)), 1, 15)
        shifted = np.round(columns[rows] / scales[group].astype(np.float32)) + zeros[group]
        numbers[rows] = np.clip(shifted, 0, 15)
    return numbers, zeros, scales


def words_of(numbers: np.ndarray, order: Sequence[int]) -> Tensor:
    """Eight neighbours of a row in an int32; `order`: which of them is in the lowest four bits, in the next, …"""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for place, neighbour in enumerate(order):
            words[:, column] |= numbers[:, 8 * column + neighbour].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def meaning(numbers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: Tensor) -> Tensor:
    rows = groups.numpy()
    values = (numbers - zeros[rows]).astype(np.float32) * scales[rows].astype(np.float32)
    return torch.from_numpy(values).half().float().T


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AutoGPTQ's first format, in which zeros are stored less one; inputs are not in the order of their groups."""
    groups = (torch.randperm(weight.shape[1]) // 32).int()
    numbers, zeros, scales = grouped_int4(weight, groups)
    plain = range(8)
    parts = {
        "qweight": words_of(numbers.T, plain).T.contiguous(),
        "qzeros": words_of(zeros - 1, plain),
        "scales": torch.from_numpy(scales),
        "g_idx": groups,
    }
    return parts, meaning(numbers, zeros, scales, groups)


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AutoAWQ's format for its matrix kernels, in whose order neighbours are."""
    groups = torch.arange(weight.shape[1]) // 32
    numbers, zeros, scales = grouped_int4(weight, groups)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": words_of(numbers, order),
        "qzeros": words_of(zeros, order),
        "scales": torch.from_numpy(scales),
    }
    return parts, meaning(numbers, zeros, scales, groups)


def write(folder: Path, model: Any, tensors: dict[str, Tensor], how: dict[str, Any] | None) -> None:
    """A model folder with these tensors."""
    tiny_model.tokenizer().save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    config |= {"quantization_config": how} if how else {}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def quantize_linear(folder: Path, kind: str, model: Any, quantizer: Quantizer, how: dict[str, Any]) -> None:
    """Every matrix of attention and MLP quantized; embeddings, head, norms and routers are left in bf16."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    model.save_pretrained(folder / "made")  # as a checkpoint names and divides them
    for name, weight in load_file(folder / "made" / "model.safetensors").items():
        weight = weight.bfloat16()
        module, _, end = name.rpartition(".")
        if end == "weight" and module.endswith("_proj"):
            parts, meant = quantizer(weight.float())
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            plain[name] = meant
        else:
            stored[name] = plain[name] = weight
    shutil.rmtree(folder / "made")
    write(folder / kind, model, stored, how)
    write(folder / f"{kind}-plain", model, plain, None)


def quantize_experts(folder: Path, model: Any) -> None:
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        weight = weight.bfloat16()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # (experts, inputs, outputs) in memory
            stored[f"{name}_blocks"], stored[f"{name}_scales"], meant = mxfp4(weight.float().transpose(1, 2))
            plain[name] = meant.transpose(1, 2)
        else:
            stored[name] = plain[name] = weight
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    write(folder / "mxfp4", model, stored, how)
    write(folder / "mxfp4-plain", model, plain, None)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    scheme = {"symmetric": True, "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }


def make(folder: Path) -> None:
    """One of each kind."""
    torch.manual_seed(0)
    dense = Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=192, tie_word_embeddings=True))
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, intermediate_size=64, moe_intermediate_size=160, num_experts=4, num_experts_per_tok=2,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    oss = GptOssForCausalLM(
        GptOssConfig(**SIZES, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=32)
    )
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    int4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    float8 = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    quantize_linear(folder, "fp8", dense, fp8, block)
    quantize_linear(folder, "fp8-experts", experts, fp8, block)
    quantize_linear(folder, "int4", dense, packed_int4, int4)
    quantize_linear(folder, "float8", dense, fp8_rows, float8)
    quantize_experts(folder, oss)
    quantize_linear(
        folder, "gptq", dense, gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    )
    quantize_linear(folder, "awq", dense, awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
