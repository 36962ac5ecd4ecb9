"""How a model is loaded in fewer bits, and onto which device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import torch
from transformers import BitsAndBytesConfig

from engine.preflight.model_checks import quantizes_experts
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.devices import has_gpus
from engine.worker.runtime.sharding import shards_weights


def quantization_config(spec: RunSpec, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantizes the model as it is loaded, for a training in `dtype`; None if it does not."""
    quantization = spec.model.quantization
    if quantization.kind == "none":
        return None
    if quantization.kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        # FSDP2 divides weights of a floating-point type, and would leave bytes whole on each GPU.
        bnb_4bit_quant_storage=dtype if shards_weights() else None,
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
    )


def expert_quantization(spec: RunSpec, adapters: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """Within it, a model is loaded with its experts quantized, if the spec's are."""
    if not quantizes_experts(spec, adapters):
        return contextlib.nullcontext()
    from engine.worker.models.quantized_experts import quantize_experts  # imports bitsandbytes

    return quantize_experts()


def device_map(spec: RunSpec) -> dict[str, int] | None:
    """Directly to its GPU: otherwise several ranks would hold as many copies in main memory. A model that is to be
    divided goes there part by part, unless the GPU quantizes it."""
    if not has_gpus() or (shards_weights() and spec.model.quantization.kind == "none"):
        return None
    return {"": int(os.environ.get("LOCAL_RANK", 0))}
