"""Frozen weights in 16 bits next to trained ones in fp32, in which no small step of the optimizer is lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def train_in_fp32(model: Any) -> None:
    """Convert the trained weights to fp32. A model with others in 16 bits computes with autocast from now on, also
    where no trainer turns it on: without it, products of the two types would fail."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if is_mixed(model):
        frozen = next(weight.dtype for weight in model.parameters() if weight.dtype != torch.float32)
        for part in (model.base_model, model):
            _compute_with_autocast(part, frozen)


def is_mixed(model: nn.Module) -> bool:
    """Whether some weights are in fp32, and others in 16 bits."""
    types = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return torch.float32 in types and len(types) > 1


def _compute_with_autocast(part: Any, dtype: torch.dtype) -> None:
    """Give the model a class of its own, which a copy has, too. For others, its type is fp32: in that it is trained and
    saved."""
    own: Any = type(part)

    def call(self: Any, *positional: Any, **named: Any) -> Any:
        with torch.autocast(self.device.type, dtype):
            return own.__call__(self, *positional, **named)

    content = {"__call__": call, "dtype": property(lambda _: torch.float32), "__module__": own.__module__}
    part.__class__ = type(own.__name__, (own,), content)


def state_in_fp32(model: nn.Module) -> dict[str, Tensor]:
    """Its state in main memory, in one type. No value changes: 16 bits are exact in 32."""
    return {
        name: tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
