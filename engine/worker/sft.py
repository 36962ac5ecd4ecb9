"""Supervised fine-tuning and pre-training: the next token, where `labels` say so."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from engine.rundir import RunDir
from engine.spec import RunSpec
from engine.worker.trainers import common_arguments, early_stopping, exact_adapter, loraplus, ours


def sft_trainer(
    spec: RunSpec,
    run: RunDir,
    model: Any,
    tokenizer: Any,
    data: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The examples are token ids already. Packed ones come without padding: the collator restarts the positions at
    each example, and attention takes them for separate sequences.
    """
    arguments = SFTConfig(
        **{"max_length": spec.data.max_length}
        | common_arguments(spec, run, measured="validation" in data)
        | {"dataset_kwargs": {"skip_prepare_dataset": True}}
    )
    with exact_adapter(model):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(
                pad_token_id=tokenizer.pad_token_id, padding_free=spec.data.packing
            ),
            callbacks=[*callbacks, *early_stopping(spec)],
            optimizers=(loraplus(spec, arguments, model), None),
        )
    return ours(trainer)
