"""Loads weights that are quantized on disk as plain weights.

`engine.models.quantized_weights` lists the kinds. transformers dequantizes while it loads; this module sets it up,
corrects what it does wrongly, and removes what would keep the model from being saved as a plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoQuantizationConfig

from engine.core.problems import Refusal, problem
from engine.models.quantized_weights import DEQUANTIZED, quantization_config

# Tensors of quantized weights that plain weights do not need: scales of activations and of the cache.
SCALES_OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale", "q_scale", "k_scale",
    "v_scale",
)  # fmt: skip


def dequantization(config: Any) -> Any:
    """The quantization config with which transformers loads the weights of this model as plain ones; None if they are
    plain already, or are used quantized."""
    how = quantization_config(config.to_dict())
    if how is None or how.get("quant_method") not in DEQUANTIZED:
        return None
    return AutoQuantizationConfig.from_dict(dict(how) | {"dequantize": True})


def forget_quantization(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a dequantized model to `dtype`, and let it be saved as a plain model.

    transformers leaves unquantized weights in their stored type. It also remembers how the weights were loaded and
    would save them in the same format, but without the scales.
    """
    loaded: Any = model
    in_fp32 = [*(loaded._keep_in_fp32_modules_strict or ())]
    in_fp32 += (loaded._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if any(part in name for part in in_fp32) else dtype)
    loaded._weight_conversions = None  # those of the architecture itself are found again when it is saved
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def refuse_unread_scales(model: PreTrainedModel, unexpected: set[str]) -> None:
    """Raises Refusal if a part of a quantized weight was not used for dequantizing it."""
    modules = {name for name, _ in model.named_modules()}
    for name in sorted(unexpected):
        module, _, kind = name.rpartition(".")
        if module in modules and kind not in SCALES_OF_ACTIVATIONS:
            raise Refusal(problem("weights-unread", "model.model_name_or_path", name=name))


def _dequantized(
    self: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
) -> Tensor:
    """Like transformers' own function, except where that is wrong: it assumes that the blocks divide the matrix evenly,
    but the last blocks may be cut off, as in DeepSeek-V3 (576 rows in blocks of 128)."""
    rows, columns = quantized.shape[-2:]
    block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
    counts = tuple(scales.shape[-2:])
    if not block or scales.ndim < 2 or counts != (-(-rows // block[0]), -(-columns // block[1])):
        return _TRANSFORMERS_OWN(self, quantized, scales, output_dtype)
    if output_dtype is None:
        output_dtype = scales.dtype if scales.dtype in (torch.float32, torch.float16) else torch.bfloat16
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    factors = factors.repeat_interleave(block[1], -1)[..., :columns]
    return (quantized.float() * factors).to(output_dtype)


_TRANSFORMERS_OWN = Fp8Dequantize._dequantize_one
Fp8Dequantize._dequantize_one = _dequantized  # type: ignore[method-assign]
