"""Supervised fine-tuning and pre-training: next-token prediction where `labels` are set, also on rows with images."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from engine.worker.training.context import TrainingContext
from engine.worker.training.image_batches import passing, with_images


class WeightedBatches(DataCollatorForLanguageModeling):
    """Batches with `loss_weights` of each token (batch, length), 0 for padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        weights = [torch.tensor(example["weights"]) for example in examples]
        weights = [torch.cat(weights)] if self.padding_free else weights
        batch["loss_weights"] = pad(weights, padding_value=0, padding_side="right")
        return batch


class WeightedSFTTrainer(SFTTrainer):
    """TRL's trainer with each token's loss multiplied by its weight.

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
    trainer: type[SFTTrainer] = SFTTrainer
    batches = DataCollatorForLanguageModeling
    if "weights" in context.data["train"].column_names:
        trainer, batches = passing(WeightedSFTTrainer, "weights"), WeightedBatches
    collator: Any = batches(pad_token_id=context.tokenizer.pad_token_id, padding_free=settings.packing)
    trainer, collator, changes = with_images(context, trainer, collator)
    arguments = context.arguments(
        SFTConfig, max_length=settings.max_length, dataset_kwargs={"skip_prepare_dataset": True}, **changes
    )
    return context.trainer(trainer, arguments, data_collator=collator)
