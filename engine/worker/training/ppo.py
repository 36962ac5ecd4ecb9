"""PPO: the model generates answers, a reward model scores them, and answers that score better than expected become more
likely.

Proximal policy optimization (Schulman et al. 2017) with a penalty on the KL to the reference model (Ziegler et al.
2019; Ouyang et al. 2022). A `Trainer` of transformers whose step is a whole batch: answer, score, update. So data,
schedule, checkpoints, callbacks and resuming are those of every other stage. The arithmetic is in `ppo_math`, the
models in `actor_critic`, the reward model in `reward_scorer`; docs/stages/ppo.md says why it is built this way.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainingArguments

from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.spec.stage_settings import Ppo
from engine.worker.generation.reasoning_marks import AnswerTexts
from engine.worker.training import ppo_math
from engine.worker.training.actor_critic import ActorCritic
from engine.worker.training.context import TrainingContext
from engine.worker.training.ppo_monitor import PpoMonitor
from engine.worker.training.result import generation_config
from engine.worker.training.reward_scorer import RewardFunction, load_reward_function
from engine.worker.training.samples import SAMPLES_PER_STEP, Sample, samples_are_due, write_samples

CHECKPOINT_FILE = "ppo.safetensors"  # parts of a checkpoint: everything trained, and the KL coefficient


@dataclass
class Rollout:
    """A batch of answers with everything known about them. Texts and attention are (B, L), the rest (B, T) on the
    answers."""

    texts: Tensor
    attention: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PpoTrainer(Trainer):
    """A step is a batch: its prompts are answered, the answers are scored, and the model learns from them several
    times.

    `per_device_train_batch_size` × `gradient_accumulation_steps` prompts per process. All updates of a step but the
    last are made here; the gradient of the last one is left to the Trainer, which continues as usual.
    """

    model: ActorCritic

    def __init__(
        self,
        model: ActorCritic,
        settings: Ppo,
        reward: RewardFunction,
        generation: GenerationConfig,
        run: RunDir,
        **arguments: Any,
    ):
        super().__init__(model=model, data_collator=_collate_prompts, **arguments)
        self.settings, self.reward, self.run = settings, reward, run
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            use_cache=True,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=generation.eos_token_id,
            pad_token_id=generation.pad_token_id,
        )
        ends = generation.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else ends
        self.kl_coef = settings.init_kl_coef
        self.prompts: list[list[int]] = []  # of this step, so far
        self.curve_values: dict[str, list[float]] = defaultdict(list)  # since the last point of the curves
        self.monitor = PpoMonitor()
        self.tokens = 0.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect the prompts of a step; with the last of them, do the step. Returns its mean loss."""
        self.prompts += inputs["prompt_ids"]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        prompts, self.prompts = self.prompts, []
        step = self.state.global_step + 1
        rollout, answered = self.make_rollout(
            prompts, step, keep_samples=samples_are_due(step, self.settings.sample_steps)
        )
        self.tokens += self._total(rollout.attention.sum().double()).item()
        loss, learned = self.update(model, rollout, step)
        metrics = answered | learned | {"kl_coef": self.kl_coef}
        for name, value in metrics.items():
            self.curve_values[name].append(value)
        if trouble := self.monitor(metrics, step):
            raise Refusal(trouble)
        answers = len(prompts) * self.args.world_size
        self.kl_coef = ppo_math.next_kl_coef(
            self.kl_coef, metrics["kl"], self.settings.kl_target, self.settings.kl_horizon, answers
        )
        return loss

    @torch.no_grad()
    def make_rollout(
        self, prompts: list[list[int]], step: int, *, keep_samples: bool = False
    ) -> tuple[Rollout, dict[str, float]]:
        """Answers to the prompts, with their advantages and metrics. `keep_samples`: a few are written to
        samples.jsonl."""
        settings, actor_critic = self.settings, self.model
        actor_critic.eval()
        prompt_ids, prompt_mask = _padded_left(prompts, self.generation.pad_token_id, self.args.device)
        with self.accelerator.autocast():
            with self._seeded(step):
                answers = actor_critic.generate_answers(prompt_ids, prompt_mask, self.generation)
            mask, ended = ppo_math.answer_mask(answers, self.ends)
            texts, attention = torch.cat([prompt_ids, answers], 1), torch.cat([prompt_mask, mask.long()], 1)
            length, temperature = answers.shape[1], settings.temperature
            parts_scored = []
            for rows in torch.arange(len(prompts)).split(self.args.per_device_train_batch_size):
                part = texts[rows], attention[rows], length, temperature
                parts_scored.append((*actor_critic(*part), actor_critic.log_probs_and_entropy("reference", *part)[0]))
        log_probs, entropy, values, reference = (torch.cat(each) for each in zip(*parts_scored, strict=True))
        answer_ids = [row[own].tolist() for row, own in zip(answers, mask, strict=True)]
        scores = self.reward(prompts, answer_ids).to(self.args.device, torch.float32)
        kl = log_probs - reference
        final = ppo_math.final_scores(scores, ended, settings.score_clip, settings.missing_eos_penalty)
        rewards = ppo_math.token_rewards(final, kl, mask, self.kl_coef)
        if settings.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, self._total, keep_mean=True)
        advantages, returns = ppo_math.advantages_and_returns(rewards, values, mask, settings.gamma, settings.lam)
        mean, variance = ppo_math.moments(advantages, mask, self._total)
        kl_of_answers = torch.where(mask, kl, 0.0).sum(1)
        metrics = {
            **self._means(reward=scores, kl=kl_of_answers, answer_length=mask.sum(1), ended=ended),
            "entropy": ppo_math.moments(entropy, mask, self._total)[0].item(),
            "advantage_mean": mean.item(),
            "advantage_std": variance.sqrt().item(),
        }
        if keep_samples and self.is_world_process_zero():
            self._write_samples(step, prompts, answer_ids, scores)
        advantages = ppo_math.whiten(advantages, mask, self._total)
        return Rollout(texts, attention, mask, log_probs, values, advantages, returns), metrics

    def update(self, model: nn.Module, rollout: Rollout, step: int) -> tuple[Tensor, dict[str, float]]:
        """All updates of a step but the last, whose gradient is left in place. Returns the mean loss, and the
        metrics."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # schedule-free optimizers have two modes
        settings, rows = self.settings, len(rollout.mask)
        shuffled = torch.Generator().manual_seed(self._seed(step))
        updates = [
            part
            for _ in range(settings.num_ppo_epochs)
            for part in torch.randperm(rows, generator=shuffled).chunk(settings.num_mini_batches)
        ]
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for number, chosen in enumerate(updates, 1):
            totals += self._gradient(model, rollout, chosen)
            if number < len(updates):
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                optimizer.step()
                model.zero_grad()
        policy, value, clipped = (self._total(totals) / len(updates)).tolist()
        loss = policy + settings.vf_coef * value
        return torch.tensor(loss, device=self.args.device), {
            "policy_loss": policy,
            "value_loss": value,
            "clip_fraction": clipped,
        }

    def _gradient(self, model: nn.Module, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Add the gradient of one update: the mean over all tokens of these answers, on all processes.

        Returns this process's share (3,) of policy loss, value loss and the share of clipped tokens.
        """
        settings, length = self.settings, rollout.mask.shape[1]
        tokens = self._total(rollout.mask[chosen].sum().double()).item()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        parts = chosen.split(self.args.per_device_train_batch_size)
        for number, rows in enumerate(parts, 1):
            last = number == len(parts)
            mask, returns = rollout.mask[rows], rollout.returns[rows]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                log_probs, _, values = model(rollout.texts[rows], rollout.attention[rows], length, settings.temperature)
                policy, clipped = ppo_math.policy_loss(
                    log_probs, rollout.log_probs[rows], rollout.advantages[rows], settings.cliprange
                )
                value = ppo_math.value_loss(values, rollout.values[rows], returns, settings.cliprange_value)
                sums = torch.stack([policy[mask].sum(), value[mask].sum(), clipped[mask].sum()]) / tokens
                # The gradients of processes are averaged, but this is to be their sum.
                loss = (sums[0] + settings.vf_coef * sums[1]) * self.args.world_size
                self.accelerator.backward(loss)
            totals += sums.detach()
        return totals

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, reduction="sum")

    def _means(self, **of_answers: Tensor) -> dict[str, float]:
        """The mean over the answers of all processes, of one value (B,) each."""
        sums = self._total(torch.stack([values.double().sum() for values in of_answers.values()]))
        count = self._total(torch.tensor(float(len(next(iter(of_answers.values())))), device=sums.device))
        return dict(zip(of_answers, (sums / count).tolist(), strict=True))

    def _seed(self, step: int) -> int:
        return random.Random(f"{self.args.seed} {step} {self.args.process_index}").getrandbits(63)

    @contextlib.contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """Randomness determined by the step: the same after a resume, and different on each process."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._seed(step))
            yield

    def _write_samples(self, step: int, prompts: list[list[int]], answers: list[list[int]], scores: Tensor) -> None:
        tokenizer: Any = self.processing_class
        decoder, few = AnswerTexts(tokenizer), slice(SAMPLES_PER_STEP)
        shown = zip(
            tokenizer.batch_decode(prompts[few], skip_special_tokens=True),
            decoder.texts(answers[few]),
            scores[few].tolist(),
            map(decoder.opens, prompts[few]),
            strict=True,
        )
        samples = (Sample(prompt, answer, score, {}, opened) for prompt, answer, score, opened in shown)
        write_samples(self.run, step, samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's own points of the curves, and the means of ours since the last."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.curve_values.items()}
            logs["num_tokens"] = self.tokens
            self.curve_values.clear()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the held-out prompts. The loss is the negated reward, so that the lowest is the best."""
        sums, count = dict.fromkeys(("eval_reward", "eval_kl", "eval_answer_length"), 0.0), 0
        for batch in self.get_eval_dataloader(eval_dataset):
            prompts = batch["prompt_ids"]
            _, of_batch = self.make_rollout(prompts, step=0)
            sums = {name: old + len(prompts) * of_batch[name.removeprefix("eval_")] for name, old in sums.items()}
            count += len(prompts)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {name: value / count for name, value in sums.items()}
        metrics["eval_loss"] = -metrics["eval_reward"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        kept = {name: weight.detach().contiguous() for name, weight in self._learned()}
        save_file(
            kept | {"kl_coef": torch.tensor(self.kl_coef, dtype=torch.float64)},
            Path(output_dir) / CHECKPOINT_FILE,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / CHECKPOINT_FILE)
        self.kl_coef = kept.pop("kl_coef").item()
        with torch.no_grad():
            for name, weight in self._learned():
                weight.copy_(kept.pop(name))
        assert not kept, f"the checkpoint has weights of another model: {', '.join(kept)}"

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # otherwise the Trainer does not ask
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)


def _collate_prompts(rows: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    return {"prompt_ids": [row["prompt_ids"] for row in rows]}


def _padded_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention, both (B, longest), so that all end at the same place."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(seen, device=device)


def ppo_trainer(context: TrainingContext) -> Trainer:
    """PPO on prompts, with a finished reward model. Raises Refusal if that cannot score this model's answers."""
    stage = context.spec.stage
    assert isinstance(stage, Ppo)
    arguments = context.arguments(TrainingArguments, remove_unused_columns=False)
    reward = load_reward_function(Path(stage.reward_model), context.tokenizer)
    generation = generation_config(context.spec, context.model, context.tokenizer)
    return replace(context, model=ActorCritic(context.model)).trainer(
        PpoTrainer, arguments, settings=stage, reward=reward, generation=generation, run=context.run
    )
