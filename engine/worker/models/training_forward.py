"""What the forward pass of a few families needs so that text can be trained, as their own code shows."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

MARKS_DEMANDED = re.compile(r"self\.training and (\w*token_type_ids) is None")


def enable_text_training(model: PreTrainedModel) -> None:
    """Let a loaded model train on rows without images, and its weights get gradients."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and (name := _demanded_marks(type(part))):
            part.register_forward_pre_hook(partial(_with_marks, name), with_kwargs=True)
    if _runs_layers_in_function(model):
        model.enable_input_require_grads()


def _demanded_marks(kind: Any) -> str:
    """The argument with the marks of image tokens, if the code rejects its absence in training (Molmo 2)."""
    match = MARKS_DEMANDED.search(inspect.getsource(kind.forward))
    return match[1] if match else ""


def _with_marks(
    name: str, model: PreTrainedModel, positional: tuple[Any, ...], arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward pass on text, with marks that say that no token stands for an image."""
    if not model.training or arguments.get(name) is not None:
        return positional, dict(arguments)
    ids: Any = arguments.get("input_ids", next(iter(positional), None))
    tokens = arguments["inputs_embeds"][..., 0] if ids is None else ids
    return positional, {**arguments, name: torch.zeros_like(tokens, dtype=torch.long)}


def _runs_layers_in_function(model: PreTrainedModel) -> bool:
    """Whether the layers run within an autograd function, as reversible ones do (Reformer): autograd then sees only the
    input of the first, and computes no gradients at all if that needs none, as that of frozen embeddings."""
    functions = (
        part
        for part in vars(sys.modules[type(model).__module__]).values()
        if inspect.isclass(part) and issubclass(part, torch.autograd.Function)
    )
    return any("layers" in inspect.signature(function.forward).parameters for function in functions)
