"""Reward model: a score for a whole conversation, higher for the better of two answers.

Its accuracy is measured at the end and saved next to its weights, so that whoever learns from its scores can first
check whether they are good, and whether the model still gives the same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import Trainer
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from engine.core.rundir import write_json, write_text
from engine.worker.models.reward_model import score_conversations
from engine.worker.training.context import TrainingContext

MAX_PAIRS_SCORED = 1024  # maximum number of held-out pairs that are scored at the end
MAX_PAIRS_SHOWN = (
    64  # number of them stored with scores; without held-out pairs, only as many training pairs are scored
)


class PreparedRewardTrainer(RewardTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # its rows are token ids already


@dataclass
class ConversationCollator(DataCollatorForPreference):
    """Each side of a pair, preceded by its prompt."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sides = ("chosen_ids", "rejected_ids")
        return super().torch_call(
            [{side: example["prompt_ids"] + example[side] for side in sides} for example in examples]
        )


def reward_trainer(context: TrainingContext) -> Trainer:
    """A Bradley–Terry model (Ouyang et al. 2022, arXiv:2203.02155, equation 1) from rows of prompt_ids, chosen_ids,
    rejected_ids: -log σ(score of the better conversation - score of the worse one)."""
    arguments = context.arguments(RewardConfig, remove_unused_columns=False)
    collator = ConversationCollator(context.tokenizer.pad_token_id)
    return context.trainer(PreparedRewardTrainer, arguments, data_collator=collator)


def write_evaluation(trainer: Trainer, folder: Path) -> None:
    """Score held-out pairs, or a few training pairs if there are none, and write into `folder`

    evaluation.json         {"split", "pairs": number, "accuracy": share ranked correctly, "margin": mean lead}
    evaluation_pairs.jsonl  up to 64 of them: prompt_ids, chosen_ids, rejected_ids, chosen_score, rejected_score
    """
    held_out = trainer.eval_dataset is not None
    rows: Any = trainer.eval_dataset if held_out else trainer.train_dataset
    split, most = ("validation", MAX_PAIRS_SCORED) if held_out else ("train", MAX_PAIRS_SHOWN)
    pairs = list(islice(rows, most))
    # Training is over, so the model scores as it will when it is loaded: without the training's autocast, except where
    # frozen weights in 16 bits need it.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    sides = ("chosen", "rejected")
    side_scores = {
        side: score_conversations(model, [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs]) for side in sides
    }
    lead = side_scores["chosen"] - side_scores["rejected"]
    write_json(
        folder / "evaluation.json",
        {
            "split": split,
            "pairs": len(pairs),
            "accuracy": (lead > 0).double().mean().item(),
            "margin": lead.mean().item(),
        },
    )
    shown = [
        {**pair, **{f"{side}_score": side_scores[side][index].item() for side in sides}}
        for index, pair in enumerate(pairs[:MAX_PAIRS_SHOWN])
    ]
    write_text(folder / "evaluation_pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in shown))
