"""Weights that GPTQ and AWQ have packed into integers, as the plain ones that they stand for.

What is stored of a matrix of (inputs, outputs): `qweight` and `qzeros`, several numbers in an int32, `scales` for each
group of inputs, and GPTQ's `g_idx`, the group of each input. A weight is (number - zero) × scale.
Frantar et al. 2022 (arXiv:2210.17323), as AutoGPTQ stores it; Lin et al. 2023 (arXiv:2306.00978), as AutoAWQ does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in an int32 of each of eight neighbours: its kernels read 0 2 4 6 1 3 5 7
PACKED_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def dequantized(tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a model by name, with packed matrices as `weight` of (outputs, inputs), in the type of their
    scales. `how`: the quantization_config."""
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in PACKED_PARTS}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = {part: tensors[f"{module}.{part}"] for part in PACKED_PARTS if f"{module}.{part}" in tensors}
            plain[f"{module}.weight"] = DEQUANTIZE[how["quant_method"]](parts, how).T.contiguous()
    return plain


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of int32 words of (rows, columns), the first in the lowest bits: (rows, columns × 32 / bits)."""
    shifts = torch.arange(0, 32, bits)
    numbers = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    return numbers.reshape(words.shape[0], -1)


def gptq(parts: Mapping[str, Tensor], how: Mapping[str, Any]) -> Tensor:
    """(inputs, outputs). In the first format one less than the zero is stored."""
    bits, scales = how["bits"], parts["scales"]
    numbers = unpacked(parts["qweight"].T.contiguous(), bits).T
    zeros = unpacked(parts["qzeros"], bits)
    if how.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    size = numbers.shape[0] if how["group_size"] == -1 else how["group_size"]
    groups = parts["g_idx"].long() if "g_idx" in parts else torch.arange(numbers.shape[0]) // size
    return ((numbers - zeros[groups]).float() * scales[groups].float()).to(scales.dtype)


def awq(parts: Mapping[str, Tensor], how: Mapping[str, Any]) -> Tensor:
    """(inputs, outputs)."""

    def ordered(words: Tensor) -> Tensor:
        return unpacked(words, 4).reshape(words.shape[0], -1, 8)[..., AWQ_ORDER].reshape(words.shape[0], -1)

    numbers, zeros, scales = ordered(parts["qweight"]), ordered(parts["qzeros"]), parts["scales"]
    size = numbers.shape[0] // scales.shape[0]
    zeros, factors = (part.repeat_interleave(size, 0) for part in (zeros, scales.float()))
    return ((numbers - zeros).float() * factors).to(scales.dtype)


DEQUANTIZE = {"gptq": gptq, "awq": awq}
