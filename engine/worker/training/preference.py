"""DPO, KTO, ORPO and SimPO: the better answer becomes more likely than the worse one.

DPO and KTO use TRL's trainers, with our token ids and the right reference. TRL has ORPO and SimPO only as experiments,
which tokenize by themselves and also train on ORPO's prompt; neither needs a reference, so here they are one short
`Trainer` on TRL's own batches and log-probabilities, and a formula each.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import add_fused_lm_head

from engine.core.problems import Refusal
from engine.core.rundir import read_json, write_json
from engine.preflight.data_checks import single_label_problem
from engine.spec.stage_settings import Dpo, Orpo, Simpo
from engine.worker.training.context import TrainingContext, reference_adapter
from engine.worker.training.image_batches import with_images, without_images


class _PreparedRows:
    """Rows are token ids already, none longer than the maximum length."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class PreparedDpoTrainer(_PreparedRows, DPOTrainer):
    pass


class PreparedKtoTrainer(_PreparedRows, KTOTrainer):
    pass


SHIFT_FILE = "bco.json"  # parts of a checkpoint: the mean of the rewards so far, and their number


class _Bco(PreparedDpoTrainer):
    """BCO (Jung et al. 2024, arXiv:2404.04656) for pairs: -log σ(r_chosen - δ) - log σ(-(r_rejected - δ)).

    δ is the mean of the implicit rewards r of all answers trained on so far, on all devices, including this batch.
    TRL's loss has none, so the difference is added to it here. During validation, δ is constant.
    """

    model: nn.Module

    def __init__(self, *positional: Any, **keywords: Any):
        super().__init__(*positional, **keywords)
        self.shift, self.rewards_seen = 0.0, 0

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        with self._recorded_log_probs() as noted:
            computed = super()._compute_loss(model, inputs, return_outputs)
        loss, *outputs = computed if return_outputs else (computed,)
        policy, reference = (log_probs.sum(1) for log_probs in noted)
        chosen, rejected = (self.beta * (policy - reference)).chunk(2)
        shift = self._updated_shift(torch.cat([chosen, rejected]).detach())
        plain = bco_loss(chosen, rejected, 0.0)
        loss = loss + self.loss_weights[0] * (bco_loss(chosen, rejected, shift) - plain).mean()
        return (loss, *outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _recorded_log_probs(self) -> Iterator[list[Tensor]]:
        """The log-probabilities (B, T) that model and reference return inside the context, in this order."""
        noted: list[Tensor] = []

        def note(_model: nn.Module, _given: Any, output: Any) -> None:
            if getattr(output, "log_probs", None) is not None:
                noted.append(output.log_probs)

        scored = [model for model in (self.model, self.ref_model) if model is not None]
        hooks = [self.accelerator.unwrap_model(model).register_forward_hook(note) for model in scored]
        try:
            yield noted
        finally:
            for hook in hooks:
                hook.remove()

    def _updated_shift(self, rewards: Tensor) -> float:
        """δ including these rewards; remembered while the model trains."""
        if self.rewards_seen and not self.model.training:
            return self.shift
        everywhere = self.accelerator.gather(rewards).float()
        seen = self.rewards_seen + len(everywhere)
        shift = self.shift + (everywhere.sum().item() - len(everywhere) * self.shift) / seen
        if self.model.training:
            self.shift, self.rewards_seen = shift, seen
        return shift

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            assert self.args.output_dir is not None
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_json(folder / SHIFT_FILE, {"shift": self.shift, "rewards_seen": self.rewards_seen})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and (kept := read_json(Path(checkpoint) / SHIFT_FILE)):
            self.shift, self.rewards_seen = kept["shift"], kept["rewards_seen"]


def bco_loss(chosen: Tensor, rejected: Tensor, shift: float) -> Tensor:
    """BCO's loss of each pair, shape (B,), from the implicit rewards of its answers."""
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)


def dpo_trainer(context: TrainingContext) -> Trainer:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290) and its variants, from rows of prompt_ids, chosen_ids,
    rejected_ids."""
    stage = context.spec.stage
    assert isinstance(stage, Dpo)
    kind: type[DPOTrainer] = _Bco if stage.loss_type == "bco_pair" else PreparedDpoTrainer
    collator = DataCollatorForPreference(context.tokenizer.pad_token_id)
    kind, collator, changes = with_images(context, kind, collator, answers=2)
    return _reference_trainer(context, kind, context.arguments(DPOConfig, **changes), collator)


def kto_trainer(context: TrainingContext) -> Trainer:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306), from rows of prompt_ids, completion_ids, label."""
    rows = context.data["train"]
    if (good := sum(rows["label"])) in (0, len(rows)):
        raise Refusal(single_label_problem(bool(good), len(rows)))
    # TRL needs the rows in order, since it pairs up the answers of a batch before the training; our collator does so
    # when the batch is formed. So rows can be shuffled, and a data set with all good answers first works equally well.
    spares = list(map(without_images, islice(rows, 16)))
    collator: Any = KlCollator(context.tokenizer.pad_token_id, spares=spares)
    kind, collator, changes = with_images(context, PreparedKtoTrainer, collator)
    arguments = context.arguments(KTOConfig, train_sampling_strategy="sequential", **changes)
    trainer = _reference_trainer(context, kind, arguments, collator)
    trainer.args.train_sampling_strategy = context.spec.extra.get("train_sampling_strategy", "random")
    return trainer


@dataclass
class KlCollator(DataCollatorForUnpairedPreference):
    """A batch of TRL's in which the answers that measure the drift (KL_…) are the batch's own, each with its
    neighbour's prompt. A batch of one row uses the answer of a spare one."""

    spares: list[dict[str, Any]] = field(default_factory=list)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        before = [examples[-1], *examples[:-1]]
        if len(examples) == 1:
            before = [example for example in self.spares if example["completion_ids"] != examples[0]["completion_ids"]][
                :1
            ] or before
        return super().torch_call(
            [
                {**example, "KL_completion_ids": other["completion_ids"]}
                for example, other in zip(examples, before, strict=True)
            ]
        )


# --------------------------------------------------------------------------------------- the reference


def _reference_trainer(
    context: TrainingContext,
    kind: Callable[..., DPOTrainer | KTOTrainer],
    arguments: TrainingArguments,
    collator: Any,
) -> DPOTrainer | KTOTrainer:
    """One of TRL's trainers that compare the model with the reference.

    The reference is, for a new adapter, the model without it; for a continued adapter, or one that starts with a part
    of the base (PiSSA), TRL's copy of it; and for trained weights, a copy of these alone, which shares the frozen ones.
    """
    lora = context.spec.method.kind == "lora"
    with reference_adapter(context.spec, context.model):
        reference = None if lora else frozen_copy(context.model)
        trainer = context.trainer(kind, arguments, ref_model=reference, data_collator=collator)
    for module in (context.model, trainer.ref_model):
        if module is not None:
            disable_base_dropout(module)
    return trainer


def frozen_copy(model: nn.Module) -> nn.Module:
    """The current model, never to be trained. Parameters that are already frozen are shared with it."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def disable_base_dropout(model: nn.Module) -> None:
    """No dropout except that of the adapter in training, because a comparison with a random output means nothing.

    TRL would turn off that one, too, whatever `method.lora_dropout` says.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("lora_dropout.default"):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


# ------------------------------------------------------------------------------------ without a reference


@dataclass(frozen=True)
class PreferenceLoss:
    """The result of a formula for a batch: the loss, the implicit rewards of both sides, and more metrics.

    Each is of shape (B,), one value per pair.
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor
    more: dict[str, Tensor]


def orpo_loss(stage: Orpo, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    """ORPO (Hong et al. 2024, arXiv:2403.07691), equations 4 to 7, from the mean log-probability per token of each
    answer, shape (B,): the SFT loss, and λ times the odds-ratio loss."""
    log_odds = (chosen - rejected) - (_log1m_exp(chosen) - _log1m_exp(rejected))
    ratio = -logsigmoid(log_odds)
    weight = stage.orpo_lambda
    metrics = {"nll_loss": -chosen, "odds_ratio_loss": ratio, "log_odds_ratio": log_odds}
    return PreferenceLoss(-chosen + weight * ratio, weight * chosen, weight * rejected, metrics)


def _log1m_exp(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, without the digits that 1 - p would lose; a certain answer is treated as nearly
    certain."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps)))


def simpo_loss(stage: Simpo, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    """SimPO (Meng et al. 2024, arXiv:2405.14734), equation 6, from the mean log-probability per token of each answer,
    shape (B,)."""
    better, worse = stage.simpo_beta * chosen, stage.simpo_beta * rejected
    return PreferenceLoss(-logsigmoid(better - worse - stage.simpo_gamma), better, worse, {})


PREFERENCE_LOSSES: dict[str, Callable[[Any, Tensor, Tensor], PreferenceLoss]] = {
    "orpo": orpo_loss,
    "simpo": simpo_loss,
}


class ReferenceFreeTrainer(Trainer):
    """Pairs scored by a formula of their mean log-probabilities. The loss of a batch is the mean over its pairs."""

    model: nn.Module
    loss_is_scaled_for_ga = False

    def __init__(self, stage: Orpo | Simpo, **arguments: Any):
        super().__init__(**arguments)
        self.stage, self.loss_function = stage, PREFERENCE_LOSSES[stage.kind]
        # Answers are scored in tiles, because the logits of a whole batch would be the largest tensor.
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(base)
        if isinstance(self.model, PeftModel) and self.args.gradient_checkpointing:
            self.model.enable_input_require_grads()
        self.can_return_loss, self.label_names = True, []  # these tell the Trainer in validation that there is a loss
        self.tokens = 0
        self.curve_values: dict[bool, dict[str, list[Tensor]]] = {mode: defaultdict(list) for mode in (True, False)}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        answers = inputs["completion_mask"][:, 1:]
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        inner = {name: value for name, value in inputs.items() if name != "completion_mask"}
        scored = model(**inner, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = (scored.log_probs.float().sum(1) / answers.sum(1).clamp(min=1)).chunk(2)
        result = self.loss_function(self.stage, chosen, rejected)
        self._record_metrics(
            inputs["attention_mask"].sum(),
            {
                "rewards/chosen": result.chosen,
                "rewards/rejected": result.rejected,
                "rewards/margins": result.chosen - result.rejected,
                "rewards/accuracies": (result.chosen > result.rejected).float(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
                **result.more,
            },
        )
        return result.loss.mean()

    def _record_metrics(self, tokens: Tensor, values: dict[str, Tensor]) -> None:
        if self.model.training:
            self.tokens += self.accelerator.gather(tokens).sum().item()
        for name, value in values.items():
            self.curve_values[self.model.training][name].append(
                self.accelerator.gather_for_metrics(value.detach()).float()
            )

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix, metrics = "" if self.model.training else "eval_", self.curve_values[self.model.training]
        logs |= {f"{prefix}{name}": torch.cat(values).mean().item() for name, values in metrics.items()}
        logs |= {f"{prefix}num_tokens": self.tokens}
        metrics.clear()
        super().log(logs, start_time)


def reference_free_trainer(context: TrainingContext) -> Trainer:
    """ORPO or SimPO, from rows of prompt_ids, chosen_ids, rejected_ids."""
    collator = DataCollatorForPreference(context.tokenizer.pad_token_id)
    kind, collator, changes = with_images(context, ReferenceFreeTrainer, collator, answers=2)
    arguments = context.arguments(TrainingArguments, remove_unused_columns=False, **changes)
    return context.trainer(kind, arguments, stage=context.spec.stage, data_collator=collator)
