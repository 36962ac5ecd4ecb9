"""Reward model: a score for a whole conversation, higher for the better of two answers.

What it learned is measured when it ends and written beside its weights, so that whoever learns from its scores can
see first whether they are any good, and whether it still gives the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from engine import kinds
from engine.problems import Refusal, problem
from engine.rundir import RESULT, RunDir, read_json, write_json, write_text
from engine.spec import RunSpec
from engine.worker.libraries import left_out, quantized
from engine.worker.model import load_model
from engine.worker.tokenizer import load_tokenizer
from engine.worker.trainers import (
    common_arguments,
    early_stopping,
    exact_adapter,
    loraplus,
    ours,
    stage_arguments,
)

MEASURED = 1024  # held-out pairs that are scored at the end, at most
SHOWN = 64  # of them, written down with their scores; of training pairs, where none are held out, no more are scored
AT_ONCE = 16  # pairs in one forward pass


class _Reward(RewardTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # engine.worker.prepare has done it


@dataclass
class _Whole(DataCollatorForPreference):
    """Each side of a pair with its prompt before it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sides = ("chosen_ids", "rejected_ids")
        return super().torch_call(
            [{side: one["prompt_ids"] + one[side] for side in sides} for one in examples]
        )


def reward_trainer(
    spec: RunSpec,
    run: RunDir,
    model: Any,
    tokenizer: Any,
    data: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Bradley–Terry model (Ouyang et al. 2022, arXiv:2203.02155, equation 1) from rows of prompt_ids, chosen_ids,
    rejected_ids: -log σ(score of the better conversation - score of the worse one)."""
    arguments = RewardConfig(
        **common_arguments(spec, run, measured="validation" in data)
        | stage_arguments(spec)
        | {"remove_unused_columns": False}
    )
    with exact_adapter(model):
        trainer = _Reward(
            model=model,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data.get("validation"),
            processing_class=tokenizer,
            data_collator=_Whole(tokenizer.pad_token_id),
            callbacks=[*callbacks, *early_stopping(spec)],
            optimizers=(loraplus(spec, arguments, model), None),
        )
    return ours(trainer)


@torch.no_grad()
def scores(model: Any, conversations: Sequence[Sequence[int]]) -> Tensor:
    """The score of each conversation of token ids, shape (B,), in fp32, from a model that does not train."""
    pad, device = model.config.get_text_config().pad_token_id, model.device
    found = []
    for start in range(0, len(conversations), AT_ONCE):
        some = [torch.tensor(ids, device=device) for ids in conversations[start : start + AT_ONCE]]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in some], batch_first=True)
        found.append(
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float().cpu()
        )
    return torch.cat(found)


def write_evaluation(trainer: Trainer, folder: Path) -> None:
    """Score held-out pairs, or a few training pairs where there are none, and write into `folder`

    evaluation.json         {"split", "pairs": how many, "accuracy": share ranked rightly, "margin": mean lead}
    evaluation_pairs.jsonl  up to 64 of them: prompt_ids, chosen_ids, rejected_ids, chosen_score, rejected_score
    """
    split, rows, most = "validation", trainer.eval_dataset, MEASURED
    if rows is None:
        split, rows, most = "train", trainer.train_dataset, SHOWN
    pairs = list(islice(rows, most))
    # Nothing is trained any more, so that it may score as whoever loads it will: without the training's autocast.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    sides = ("chosen", "rejected")
    told = {side: scores(model, [one["prompt_ids"] + one[f"{side}_ids"] for one in pairs]) for side in sides}
    lead = told["chosen"] - told["rejected"]
    write_json(folder / "evaluation.json", {
        "split": split, "pairs": len(pairs), "accuracy": (lead > 0).double().mean().item(), "margin": lead.mean().item(),
    })  # fmt: skip
    shown = [
        {**pair, **{f"{side}_score": told[side][index].item() for side in sides}}
        for index, pair in enumerate(pairs[:SHOWN])
    ]
    write_text(folder / "evaluation_pairs.jsonl", "".join(json.dumps(one) + "\n" for one in shown))


def load_reward_model(folder: Path) -> tuple[Any, Any]:
    """The reward model and the tokenizer in the result folder (adapter/ or model/) of a run, as it was trained:
    quantization, precision and all that its spec says. For scoring only: nothing of it is trained.

    Raises Refusal if the folder is no result of a reward model's run, or is quantized where nothing was to be.
    """
    run, told = RunDir(folder.parent), read_json(folder / RESULT) or {}
    if told.get("stage") != "rm":
        raise Refusal(problem("not-a-reward-model", folder=folder, stage=told.get("stage") or "—"))
    spec = kinds.read(run.spec.read_text(encoding="utf-8"))
    if not isinstance(spec, RunSpec):  # an export has the model's settings and no others
        method = "lora" if folder == run.adapter else "full"
        spec = RunSpec.read({"stage": "rm", "method": method, "model": spec.model.model_dump()})
    if spec.method.kind == "lora":
        spec = spec.change("model.adapter_path", str(folder))
        path = (read_json(run.prepared / "summary.json") or {}).get(
            "model_path", spec.model.model_name_or_path
        )
    else:
        # The configuration in the folder has been stretched already.
        spec, path = spec.change("model.rope_scaling", {"kind": "none"}), str(folder)
    if left_out() and quantized(spec.model):
        raise Refusal(problem("judge-came-late"))
    tokenizer = load_tokenizer(spec, str(folder))
    model = load_model(spec, path)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer
