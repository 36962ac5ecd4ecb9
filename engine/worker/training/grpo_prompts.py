"""TRL's GRPO trainer on prepared prompts: token ids instead of texts, and images as in the other stages.

TRL builds the inputs for images from chat messages, for the model families it knows. Here they are built from the
prepared rows whenever the model is called, as for all other stages, and the rows' images travel with the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.templates.image_tokens import ImageTokens, media_token_ids, placed_inputs
from engine.worker.training.image_batches import pixel_inputs

Records = Sequence[Mapping[str, Any]]  # the images of a prepared row


class PreparedPromptsTrainer(GRPOTrainer):
    """The rows have `prompt` (token ids) and, if there are `images`, IMAGES_COLUMN."""

    model: nn.Module

    def __init__(self, images: ImageTokens | None, **arguments: Any):
        super().__init__(**arguments)
        self.images = images
        self.row_images: list[Records] = []  # of the rows that the model is called with
        if images and (tokens := media_token_ids(images.processor, self.model.config)):
            # An answer with such a token would have no pixels for it.
            tokens += self.generation_kwargs.get("suppress_tokens") or []
            self.generation_kwargs["suppress_tokens"] = tokens
            self.generation_config.suppress_tokens = tokens

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.images:
            return super()._generate_and_score_completions(inputs)
        self.row_images = [row[IMAGES_COLUMN] for row in inputs]
        return super()._generate_and_score_completions(inputs) | {IMAGES_COLUMN: self.row_images}

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        if not self.images:
            return prompts, None, {}
        seen: dict[str, Any] = placed_inputs(pixel_inputs(self.images, self.row_images), self.model)
        for ids in prompts:
            for name, marks in self.images.token_types(torch.tensor([ids])).items():
                seen.setdefault(name, []).append(marks[0].tolist())
        return prompts, None, seen

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.row_images = inputs.get(IMAGES_COLUMN, [])
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """TRL's, `batch_size` rows at a time, each batch with its own images."""
        score: Callable[..., Any] = super()._get_per_token_logps_and_entropies
        if not self.images:
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        scored = []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            begin, end = int(rows[0]), int(rows[-1]) + 1
            ids = input_ids[begin:end]
            seen = pixel_inputs(self.images, self.row_images[begin:end]) | self.images.token_types(ids)
            seeing = partial(model, **placed_inputs(seen, self.model))
            scored.append(score(seeing, ids, attention_mask[begin:end], logits_to_keep, **options))
        log_probs, entropies, auxiliary = zip(*scored, strict=True)
        return (
            torch.cat(log_probs),
            None if entropies[0] is None else torch.cat(entropies),
            None if auxiliary[0] is None else torch.stack(auxiliary).mean(),
        )
