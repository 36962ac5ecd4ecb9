"""Supervised fine-tuning and pre-training: next-token prediction where `labels` are set."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from engine.worker.training.context import TrainingContext


class _WeightedBatches(DataCollatorForLanguageModeling):
    """Batches with `loss_weights`: of each token (batch, length), 0 where there is padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        weights = [torch.tensor(example["weights"]) for example in examples]
        weights = [torch.cat(weights)] if self.padding_free else weights
        batch["loss_weights"] = pad(weights, padding_value=0, padding_side="right")
        return batch


class _WeightedSFT(SFTTrainer):
    """TRL's trainer with each token's loss multiplied by its weight; see
    `engine.worker.data.turn_weights` for the formula.

    TRL sums the log-probabilities of a model's output and divides by the number of trained tokens of the whole step; so
    they are multiplied where they come out of the model, and all else is TRL's.
    """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if "weights" not in columns:
            columns.append("weights")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop("loss_weights")[:, 1:]  # of the token that each position has to predict

        def weighing(**arguments: Any) -> Any:
            outputs = model(**arguments)
            if arguments.get("fused_lm_head"):
                # Prompt learning puts tokens of its own before the others.
                own = outputs.log_probs.shape[1] - weights.shape[1]
                outputs.log_probs = outputs.log_probs * torch.nn.functional.pad(weights, (own, 0))
            return outputs

        return super().compute_loss(weighing, inputs, return_outputs, num_items_in_batch)


def sft_trainer(context: TrainingContext) -> Trainer:
    """The examples are token ids already. Packed ones come without padding: the collator restarts the positions at
    each example, and attention takes them for separate sequences.
    """
    settings = context.spec.data
    arguments = context.arguments(
        SFTConfig, max_length=settings.max_length, dataset_kwargs={"skip_prepare_dataset": True}
    )
    weighted = "weights" in context.data["train"].column_names
    collator = _WeightedBatches if weighted else DataCollatorForLanguageModeling
    return context.trainer(
        _WeightedSFT if weighted else SFTTrainer,
        arguments,
        data_collator=collator(pad_token_id=context.tokenizer.pad_token_id, padding_free=settings.packing),
    )
