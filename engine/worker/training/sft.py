"""Supervised fine-tuning and pre-training: next-token prediction where `labels` are set, also on rows with images."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from engine.core.rundir import read_json
from engine.data.images import ImageSource, decode
from engine.worker.data.cache import SUMMARY_FILE
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.models.processor import image_options, load_image_tokens
from engine.worker.templates.image_tokens import ImageTokens
from engine.worker.training.context import TrainingContext

IMAGE_PROCESSES = 2  # per training process; they decode images


class _WeightedBatches(DataCollatorForLanguageModeling):
    """Batches with `loss_weights` of each token (batch, length), 0 for padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        weights = [torch.tensor(example["weights"]) for example in examples]
        weights = [torch.cat(weights)] if self.padding_free else weights
        batch["loss_weights"] = pad(weights, padding_value=0, padding_side="right")
        return batch


class _ImageBatches:
    """The batches of another collator with the inputs for the images: pixels, and marks of image tokens. Images are
    decoded here, in the data loader's processes, in parallel with training."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], images: ImageTokens):
        self.collator, self.images = collator, images

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sources = [[ImageSource(**image) for image in example.pop(IMAGES_COLUMN)] for example in examples]
        batch = self.collator(examples)
        batch |= self.images.token_types(batch["input_ids"])
        if any(sources):
            batch |= self.images.pixels([[decode(image) for image in images] for images in sources if images])
        return batch


def _keeping(trainer: type[SFTTrainer], column: str) -> type[SFTTrainer]:
    """A trainer that passes one more column to its collator."""

    class Keeping(trainer):  # type: ignore[misc,valid-type]
        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    return Keeping


class _WeightedSFT(SFTTrainer):
    """TRL's trainer with each token's loss multiplied by its weight; see `engine.worker.data.turn_weights` for the
    formula.

    TRL sums the log-probabilities of a model's output and divides by the number of trained tokens of the whole step; so
    they are multiplied where they leave the model, and everything else is TRL's.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop("loss_weights")[:, 1:]  # of the token that each position has to predict

        def weighing(**arguments: Any) -> Any:
            outputs = model(**arguments)
            if arguments.get("fused_lm_head"):
                # Prompt learning puts its own tokens before the others.
                own = outputs.log_probs.shape[1] - weights.shape[1]
                outputs.log_probs = outputs.log_probs * torch.nn.functional.pad(weights, (own, 0))
            return outputs

        return super().compute_loss(weighing, inputs, return_outputs, num_items_in_batch)


def sft_trainer(context: TrainingContext) -> Trainer:
    """The examples are already token ids. Packed ones have no padding: the collator restarts the positions at each
    example, and attention treats them as separate sequences."""
    settings = context.spec.data
    columns = context.data["train"].column_names
    trainer: type[SFTTrainer] = SFTTrainer
    batches = DataCollatorForLanguageModeling
    if "weights" in columns:
        trainer, batches = _keeping(_WeightedSFT, "weights"), _WeightedBatches
    collator: Any = batches(pad_token_id=context.tokenizer.pad_token_id, padding_free=settings.packing)
    changes: dict[str, Any] = {}
    if IMAGES_COLUMN in columns:
        trainer, collator = _keeping(trainer, IMAGES_COLUMN), _ImageBatches(collator, _images_of_model(context))
        # The tokenizer's threads do not survive in the processes that decode images.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        changes = {"dataloader_num_workers": IMAGE_PROCESSES}
    arguments = context.arguments(
        SFTConfig,
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        **changes | {name: context.spec.extra[name] for name in changes if name in context.spec.extra},
    )
    return context.trainer(trainer, arguments, data_collator=collator)


def _images_of_model(context: TrainingContext) -> ImageTokens:
    path = read_json(context.run.prepared / SUMMARY_FILE)["model_path"]
    return load_image_tokens(path, context.tokenizer, **image_options(context.spec))
