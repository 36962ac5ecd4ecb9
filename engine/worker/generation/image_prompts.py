"""Reading a prompt with images into the cache of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from engine.worker.templates.image_tokens import placed_inputs


def read_with_images(
    model: PreTrainedModel, prompt: Tensor, mask: Tensor, cache: DynamicCache, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The logits (1, V) after a prompt (1, T), in fp32, and the offset of the positions after it (1,): in some
    families, an image has fewer positions than tokens. `inputs`: image arguments of the forward pass."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in inputs.items() if name not in tensors}
    # No positions are passed: the model determines those of image tokens itself.
    read = model(
        input_ids=prompt,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **placed_inputs(tensors, model),
        **others,
    )
    parts: Iterator[Any] = model.modules()
    shifts = [part.rope_deltas for part in parts if hasattr(part, "rope_deltas")]
    shift = shifts[0].view(-1).clone() if shifts else prompt.new_zeros(1)
    return read.logits[:, -1].float(), shift
