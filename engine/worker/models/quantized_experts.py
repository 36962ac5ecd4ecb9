"""Experts in 4 or 8 bits: quantized as they are loaded, and dequantized one tensor at a time to compute with them.

bitsandbytes quantizes linear layers alone. In transformers 5, the routed experts of a layer are two parameters of
(experts, …, …), whose class in most families has the interface of `transformers.integrations.moe`. Such experts get
another forward pass here. Only a tensor that a product needs at the moment is in 16 bits; nothing of it is kept for
the backward pass, which dequantizes it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import _grouped_mm
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from engine.worker.models.structure import quantizable_experts


class GroupedProduct(torch.autograd.Function):
    """Each row of (rows, inputs) times the matrix of its expert: rows are sorted by expert, those of expert i end
    before `ends[i]`. `matrices` returns them as (experts, inputs, outputs), once for each pass; they get no
    gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Callable[[], Tensor], ends: Tensor) -> Tensor:
        ctx.matrices, ctx.ends, ctx.dtype = matrices, ends, rows.dtype
        return _grouped_mm(rows, matrices(), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _grouped_mm(gradient, ctx.matrices().transpose(-2, -1), ctx.ends).to(ctx.dtype), None, None


class QuantizedExperts(nn.Module):
    """The forward pass of experts with quantized matrices, by the interface of transformers' own: the same sums as its
    "grouped_mm"."""

    compute_dtype: torch.dtype

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self
        tokens, top_k = len(hidden_states), top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort()
        products = partial(self._products, experts)
        inner = products(hidden_states[order // top_k], "gate_up_proj" if own.has_gate else "up_proj")
        inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
        outer = products(inner, "down_proj")
        if own.has_post_expert_norm:
            outer = own.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1)[order, None]
        by_token = torch.empty_like(weighted).index_copy(0, order, weighted).view(tokens, top_k, -1)
        return by_token.sum(1).to(hidden_states.dtype)

    def _products(self, experts: Tensor, rows: Tensor, name: str) -> Tensor:
        """Each row times the matrix called `name` of its expert, plus its bias."""
        own: Any = self
        weight, chosen, groups = getattr(own, name), None, torch.arange(own.num_experts, device=experts.device)
        if len(experts) < own.num_experts:  # a few tokens, as in generation: dequantize the matrices of their experts
            groups = chosen = experts.unique_consecutive()
        ends = torch.searchsorted(experts, groups, right=True, out_int32=True)

        def matrices() -> Tensor:
            of_experts = DEQUANTIZE[type(weight)](weight, chosen, own.compute_dtype)
            return of_experts if own.is_transposed else of_experts.transpose(-2, -1)

        products = GroupedProduct.apply(rows, matrices, ends)
        return products + getattr(own, f"{name}_bias")[experts] if own.has_bias else products


def _from_4_bits(weight: Any, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    count, *shape = state.shape
    codes, whole_blocks = weight.data, shape[0] * shape[1] % state.blocksize == 0
    if chosen is not None and whole_blocks:
        codes, scales, count = codes.view(count, -1)[chosen], scales.view(count, -1)[chosen], len(chosen)
    # As one row: on a CPU, bitsandbytes goes wrong with rows that are not made of whole blocks.
    row = functional.QuantState(
        scales.reshape(-1).float(), torch.Size([count * shape[0] * shape[1]]), dtype=dtype, blocksize=state.blocksize,
        quant_type=state.quant_type,
    )  # fmt: skip
    matrices = functional.dequantize_4bit(codes.reshape(-1, 1), row).view(count, *shape)
    return matrices if chosen is None or whole_blocks else matrices[chosen]


def _from_8_bits(weight: Any, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, scales = weight.data, weight.SCB.view(*weight.shape[:-1], 1) / 127
    if chosen is not None:
        codes, scales = codes[chosen], scales[chosen]
    return torch.mul(codes, scales, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))


DEQUANTIZE: dict[type, Callable[[Any, Tensor | None, torch.dtype], Tensor]] = {
    Params4bit: _from_4_bits,
    Int8Params: _from_8_bits,
}  # (weight, indices of the experts needed or None for all, type) → (experts, …, …)


def _to_4_bits(value: Tensor, config: Any) -> nn.Parameter:
    options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
    weight: Any = Params4bit(value, requires_grad=False, **options)
    return weight.to(value.device)  # which quantizes it


def _to_8_bits(value: Tensor, _config: Any) -> nn.Parameter:
    """A scale for each row, as in a linear layer. Activations are not quantized."""
    codes, scales, _ = functional.int8_vectorwise_quant(value.flatten(0, 1).to(torch.float16))
    return Int8Params(codes.view(value.shape), requires_grad=False, SCB=scales)


class _Quantize(ConversionOps):
    """A step of transformers' loading, for the tensors of a parameter once they are one."""

    def __init__(self, quantizer: Any, other: ConversionOps) -> None:
        self.quantizer, self.other = quantizer, other

    def convert(self, input_dict: dict[str, Any], *positional: Any, **context: Any) -> dict[str, Any]:
        experts = {name: value for name, value in input_dict.items() if name in self.quantizer.experts}
        rest = {name: value for name, value in input_dict.items() if name not in experts}
        converted: dict[str, Any] = self.other.convert(rest, *positional, **context) if rest else {}
        config = self.quantizer.quantization_config
        for name, value in experts.items():
            value = value[0] if isinstance(value, list) else value
            converted[name] = (_to_4_bits if config.load_in_4bit else _to_8_bits)(value, config)
        return converted


class _ExpertQuantizer:
    """What a quantizer of transformers does, for experts, too; unless the weights are quantized on disk."""

    pre_quantized: bool
    quantization_config: Any
    experts: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: Any, *positional: Any, **context: Any) -> None:
        own: Any = super()
        own._process_model_before_weight_loading(model, *positional, **context)
        self.experts = frozenset(() if self.pre_quantized else quantizable_experts(model))
        config = self.quantization_config
        for name in self.experts:
            part: Any = model.get_submodule(name.rpartition(".")[0])
            in_8_bits = model.get_parameter(name).dtype
            part.compute_dtype = config.bnb_4bit_compute_dtype if config.load_in_4bit else in_8_bits
            kind: Any = type(part)
            if not issubclass(kind, QuantizedExperts):
                part.__class__ = _with_quantized_matrices(kind)
        model.has_quantized_experts = bool(self.experts)

    def param_needs_quantization(self, model: Any, param_name: str, **context: Any) -> bool:
        own: Any = super()
        return param_name in self.experts or own.param_needs_quantization(model, param_name, **context)

    def get_quantize_ops(self) -> ConversionOps:
        own: Any = super()
        return _Quantize(self, own.get_quantize_ops())


@cache
def _with_quantized_matrices(kind: Hashable) -> Any:
    own: Any = kind
    return type(f"Quantized{own.__name__}", (QuantizedExperts, own), {"__module__": own.__module__})


class _ExpertQuantizer4bit(_ExpertQuantizer, Bnb4BitHfQuantizer):
    pass


class _ExpertQuantizer8bit(_ExpertQuantizer, Bnb8BitHfQuantizer):
    pass


QUANTIZERS = {"bitsandbytes_4bit": _ExpertQuantizer4bit, "bitsandbytes_8bit": _ExpertQuantizer8bit}


@contextlib.contextmanager
def quantize_experts() -> Iterator[None]:
    """Within it, transformers quantizes the experts of a model that it loads in 4 or 8 bits."""
    own = {name: AUTO_QUANTIZER_MAPPING[name] for name in QUANTIZERS}
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(own)
