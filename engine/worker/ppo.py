"""PPO: the model writes answers, a reward model scores them, and what scored better than expected becomes likelier.

Proximal policy optimization (Schulman et al. 2017) with a penalty on the KL to what the model was (Ziegler et al.
2019; Ouyang et al. 2022). A `Trainer` of transformers whose one step is a whole batch: answer, judge, learn. So data,
schedule, checkpoints, callbacks and resuming are those of every other stage. The arithmetic is in `ppo_maths`, the
reward model in `scorer`; docs/stages/ppo.md says why it is built this way.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from engine.problems import Problem, Refusal, problem
from engine.rundir import RunDir
from engine.spec import Ppo, RunSpec
from engine.worker import ppo_maths
from engine.worker.result import generation_config
from engine.worker.samples import KEPT, Sample, due, write_samples
from engine.worker.scorer import Reward, reward_of
from engine.worker.trainers import common_arguments, early_stopping, loraplus, ours

WEIGHTS = "ppo.safetensors"  # of a checkpoint: whatever is trained, and the KL's weight
WATCHED = 5  # batches in a row that have to look bad
LOWEST_KL = (
    -1.0
)  # nats an answer. A KL is never negative; a mean of samples this far below zero is no accident
HIGHEST_KL = 5.0  # nats a token: what the model writes, the reference would write one time in 150 a token
SHORTEST = 1.1  # tokens an answer, the end among them


class ActorCritic(nn.Module):
    """The policy and the critic, which learn, and the reference, which stays what the policy was.

    With LoRA all three are one model with different adapters on: "default", "critic" and none. If the policy begins
    with an adapter that has learned already, the reference is a frozen copy of that, and the critic begins as one.
    Otherwise a frozen copy of the whole model is the reference, and with an adapter on it the critic. A value is
    read off the critic's last hidden state by a linear head, which begins at zero.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel):
        super().__init__()
        self.policy = policy
        if isinstance(policy, PeftModel):
            self.copy = None
            adapted, config = policy, policy.peft_config["default"]
            begun = any(weight.any() for name, weight in policy.named_parameters() if "lora_B" in name)
            reference = "reference" if begun else None
            if begun:
                _add_twin(policy, "reference", config)
            # No whole modules: an output head beside the critic's own would only lie about.
            _add_twin(policy, "critic", config, modules_to_save=None)
            self.learning, roles = ["default", "critic"], {"policy": (policy, "default")}
        else:
            frozen = copy.deepcopy(policy).requires_grad_(False)
            adapted = self.copy = get_peft_model(
                frozen, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), adapter_name="critic"
            )
            reference = None
            self.learning, roles = ["critic"], {"policy": (policy, None)}
        self.roles = roles | {"critic": (adapted, "critic"), "reference": (adapted, reference)}
        self.role = self.acting = ""  # played last, and the adapter that is on
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for module in self.modules():
            # The ratio of new to old probability has to begin at 1.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        adapted.set_requires_grad("reference", False)
        self.play("critic")

    def play(self, role: str) -> PreTrainedModel:
        """The language model with the adapter of `role` on."""
        model, adapter = self.roles[role]
        self.role = role
        if not isinstance(model, PeftModel):
            return model
        if self.acting != adapter:
            if adapter:
                model.base_model.enable_adapter_layers()
                model.set_adapter(adapter, inference_mode=True)
            else:
                model.base_model.disable_adapter_layers()
            model.set_requires_grad(self.learning, True)  # peft takes what is not on for frozen
            self.acting = adapter
        return model.get_base_model()

    def forward(
        self, texts: Tensor, attention: Tensor, length: int, temperature: float
    ) -> tuple[Tensor, ...]:
        """Of the last `length` tokens of texts (B, L): log-probabilities, entropies and values, each (B, length)."""
        log_probs, entropy = self.judge("policy", texts, attention, length, temperature)
        backbone = self.play("critic").base_model
        hidden = backbone(**_inputs(texts, attention)).last_hidden_state[:, -length - 1 : -1]
        with torch.autocast(hidden.device.type, enabled=False):
            return log_probs, entropy, self.head(hidden.float()).squeeze(-1)

    def judge(
        self, role: str, texts: Tensor, attention: Tensor, length: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, length) of the last tokens, for "policy" or "reference"."""
        model = self.play(role)
        logits = model(**_inputs(texts, attention), logits_to_keep=length + 1).logits[:, :-1]
        return ppo_maths.log_probs_and_entropy(logits / temperature, texts[:, -length:])

    def answer(self, prompts: Tensor, attention: Tensor, config: GenerationConfig) -> Tensor:
        """Sampled answers (B, at most max_new_tokens) to prompts that are padded on the left."""
        model = self.play("policy")
        # What the model's own config says for chatting (a repetition penalty, top-k) is not what is learned from.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            texts = model.generate(prompts, attention_mask=attention, generation_config=config)
        finally:
            model.generation_config = own
        return texts[:, prompts.shape[1] :]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As transformers' own. What is computed again in the backward pass is computed in the role it had."""

        def again() -> tuple[Any, Any]:
            role = self.role
            return contextlib.nullcontext(), _OnEntering(lambda: self.play(role))

        given = (activation_checkpointing_kwargs or {}) | {"use_reentrant": False, "context_fn": again}
        for role in ("policy", "critic"):
            self.play(role).activation_checkpointing_enable(given, **options)


class _OnEntering(contextlib.AbstractContextManager):
    """Does something when it is entered, and leaves it done."""

    def __init__(self, do: Callable[[], Any]):
        self.do = do

    def __enter__(self) -> None:
        self.do()

    def __exit__(self, *_: object) -> None:
        pass


def _add_twin(model: PeftModel, name: str, config: LoraConfig, **changes: Any) -> None:
    """Add an adapter that is what "default" is now."""
    twin = copy.deepcopy(config)
    for key, value in {"init_lora_weights": True, "lora_dropout": 0.0, **changes}.items():
        setattr(twin, key, value)
    model.add_adapter(name, twin)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for path, weight in weights.items():
            if (
                f".{name}" in path
                and (source := weights.get(path.replace(f".{name}", ".default"))) is not None
            ):
                weight.copy_(source)


def _inputs(texts: Tensor, attention: Tensor) -> dict[str, Any]:
    places = (attention.cumsum(1) - 1).clamp(min=0)  # a text begins at 0 however far it is padded
    return {"input_ids": texts, "attention_mask": attention, "position_ids": places, "use_cache": False}


@dataclass
class Rollout:
    """A batch of answers and all that is known of them. Texts and attention (B, L), the rest (B, T) on the answers."""

    texts: Tensor
    attention: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PpoTrainer(Trainer):
    """A step is a batch: its prompts are answered, the answers judged, and then learned from several times over.

    `per_device_train_batch_size` × `gradient_accumulation_steps` prompts a process. Of the updates of a step all but
    the last are made here; the last one's gradient is left to the Trainer, which goes on with it as with any other.
    """

    def __init__(
        self,
        model: ActorCritic,
        settings: Ppo,
        reward: Reward,
        generation: GenerationConfig,
        run: RunDir,
        **given: Any,
    ):
        super().__init__(model=model, data_collator=_prompts_of, **given)
        self.settings, self.reward, self.run = settings, reward, run
        self.generation = GenerationConfig(
            do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0, use_cache=True,
            max_new_tokens=settings.max_new_tokens, eos_token_id=generation.eos_token_id,
            pad_token_id=generation.pad_token_id,
        )  # fmt: skip
        ends = generation.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else ends
        self.kl_coef = settings.init_kl_coef
        self.prompts: list[list[int]] = []  # of this step, so far
        self.told: dict[str, list[float]] = defaultdict(list)  # since the last point of the curves
        self.watch = Watch()
        self.tokens = 0.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect the prompts of a step; with the last of them, make the step. Returns its mean loss."""
        self.prompts += inputs["prompt_ids"]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        prompts, self.prompts = self.prompts, []
        step = self.state.global_step + 1
        rollout, answered = self.answer_and_judge(prompts, step, kept=due(step, self.settings.sample_steps))
        self.tokens += self._total(rollout.attention.sum().double()).item()
        loss, learned = self.learn(model, rollout, step)
        told = answered | learned | {"kl_coef": self.kl_coef}
        for name, value in told.items():
            self.told[name].append(value)
        if problem_seen := self.watch(told, step):
            raise Refusal(problem_seen)
        answers = len(prompts) * self.args.world_size
        self.kl_coef = ppo_maths.next_kl_coef(
            self.kl_coef, told["kl"], self.settings.kl_target, self.settings.kl_horizon, answers
        )
        return loss

    @torch.no_grad()
    def answer_and_judge(
        self, prompts: list[list[int]], step: int, *, kept: bool = False
    ) -> tuple[Rollout, dict[str, float]]:
        """Answers to the prompts, with their advantages, and what to tell of them. `kept`: a few go into the samples."""
        settings, cast = self.settings, self.model
        cast.eval()
        asked, seen = _padded_left(prompts, self.generation.pad_token_id, self.args.device)
        with self.accelerator.autocast():
            with self._seeded(step):
                answers = cast.answer(asked, seen, self.generation)
            mask, ended = ppo_maths.answer_mask(answers, self.ends)
            texts, attention = torch.cat([asked, answers], 1), torch.cat([seen, mask.long()], 1)
            length, temperature = answers.shape[1], settings.temperature
            judged = []
            for rows in torch.arange(len(prompts)).split(self.args.per_device_train_batch_size):
                part = texts[rows], attention[rows], length, temperature
                judged.append((*cast(*part), cast.judge("reference", *part)[0]))
        log_probs, entropy, values, reference = (torch.cat(each) for each in zip(*judged, strict=True))
        told_answers = [row[own].tolist() for row, own in zip(answers, mask, strict=True)]
        scores = self.reward(prompts, told_answers).to(self.args.device, torch.float32)
        kl = log_probs - reference
        final = ppo_maths.final_scores(scores, ended, settings.score_clip, settings.missing_eos_penalty)
        rewards = ppo_maths.token_rewards(final, kl, mask, self.kl_coef)
        if settings.whiten_rewards:
            rewards = ppo_maths.whiten(rewards, mask, self._total, keep_mean=True)
        advantages, returns = ppo_maths.advantages_and_returns(
            rewards, values, mask, settings.gamma, settings.lam
        )
        mean, variance = ppo_maths.moments(advantages, mask, self._total)
        kl_of_answers = torch.where(mask, kl, 0.0).sum(1)
        told = {
            **self._means(reward=scores, kl=kl_of_answers, answer_length=mask.sum(1), ended=ended),
            "entropy": ppo_maths.moments(entropy, mask, self._total)[0].item(),
            "advantage_mean": mean.item(), "advantage_std": variance.sqrt().item(),
        }  # fmt: skip
        if kept and self.is_world_process_zero():
            self._keep_samples(step, prompts, told_answers, scores)
        advantages = ppo_maths.whiten(advantages, mask, self._total)
        return Rollout(texts, attention, mask, log_probs, values, advantages, returns), told

    def learn(self, model: nn.Module, rollout: Rollout, step: int) -> tuple[Tensor, dict[str, float]]:
        """All updates of a step but the last, whose gradient is left in place. Returns the mean loss, and what to tell."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free ones have two faces
        settings, rows = self.settings, len(rollout.mask)
        shuffled = torch.Generator().manual_seed(self._seed(step))
        updates = [
            part
            for _ in range(settings.num_ppo_epochs)
            for part in torch.randperm(rows, generator=shuffled).chunk(settings.num_mini_batches)
        ]
        told = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for number, chosen in enumerate(updates, 1):
            told += self._gradient(model, rollout, chosen)
            if number < len(updates):
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
        policy, value, clipped = (self._total(told) / len(updates)).tolist()
        loss = policy + settings.vf_coef * value
        return torch.tensor(loss, device=self.args.device), {
            "policy_loss": policy, "value_loss": value, "clip_fraction": clipped,
        }  # fmt: skip

    def _gradient(self, model: nn.Module, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Add the gradient of one update: the mean over all tokens of these answers, on all processes.

        Returns this process's share (3,) of policy loss, value loss and share of clipped tokens.
        """
        settings, length = self.settings, rollout.mask.shape[1]
        tokens = self._total(rollout.mask[chosen].sum().double()).item()
        told = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        parts = chosen.split(self.args.per_device_train_batch_size)
        for number, rows in enumerate(parts, 1):
            last = number == len(parts)
            mask, returns = rollout.mask[rows], rollout.returns[rows]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                log_probs, _, values = model(
                    rollout.texts[rows], rollout.attention[rows], length, settings.temperature
                )
                policy, clipped = ppo_maths.policy_loss(
                    log_probs, rollout.log_probs[rows], rollout.advantages[rows], settings.cliprange
                )
                value = ppo_maths.value_loss(values, rollout.values[rows], returns, settings.cliprange_value)
                sums = torch.stack([policy[mask].sum(), value[mask].sum(), clipped[mask].sum()]) / tokens
                # Processes' gradients are averaged, and this is to be their sum.
                loss = (sums[0] + settings.vf_coef * sums[1]) * self.args.world_size
                self.accelerator.backward(loss)
            told += sums.detach()
        return told

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
        """Randomness that the step decides: it is the same after a resume, and no other on each process."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._seed(step))
            yield

    def _keep_samples(
        self, step: int, prompts: list[list[int]], answers: list[list[int]], scores: Tensor
    ) -> None:
        words = self.processing_class.batch_decode
        few = slice(KEPT)
        shown = zip(
            words(prompts[few], skip_special_tokens=True), words(answers[few], skip_special_tokens=True),
            scores[few].tolist(), strict=True,
        )  # fmt: skip
        write_samples(self.run, step, (Sample(asked, said, score, {}) for asked, said, score in shown))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own points of the curves, and the means of ours since the last."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.told.items()}
            logs["num_tokens"] = self.tokens
            self.told.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, **_: Any) -> dict[str, float]:
        """Answer the prompts set aside. The loss is the negated reward, so that the least of it is the best."""
        sums, count = dict.fromkeys(("eval_reward", "eval_kl", "eval_answer_length"), 0.0), 0
        for batch in self.get_eval_dataloader(eval_dataset):
            prompts = batch["prompt_ids"]
            _, told = self.answer_and_judge(prompts, step=0)
            sums = {name: old + len(prompts) * told[name.removeprefix("eval_")] for name, old in sums.items()}
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
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        kept = {name: weight.detach().contiguous() for name, weight in self._learned()}
        save_file(
            kept | {"kl_coef": torch.tensor(self.kl_coef, dtype=torch.float64)}, Path(output_dir) / WEIGHTS
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        self.kl_coef = kept.pop("kl_coef").item()
        with torch.no_grad():
            for name, weight in self._learned():
                weight.copy_(kept.pop(name))
        assert not kept, f"the checkpoint has weights of another model: {', '.join(kept)}"

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)


class Watch:
    """Looks at each batch, and says after a few bad ones in a row why it makes no sense to go on."""

    def __init__(self) -> None:
        self.kl: deque[float] = deque(maxlen=WATCHED)
        self.kl_of_token: deque[float] = deque(maxlen=WATCHED)
        self.length: deque[float] = deque(maxlen=WATCHED)

    def __call__(self, told: dict[str, float], step: int) -> Problem | None:
        """`told`: the figures of a batch by their names. None: it may go on."""
        spoiled = [name for name, value in told.items() if not math.isfinite(value)]
        if spoiled:
            return problem("ppo-not-finite", "training.learning_rate", step=step, names=", ".join(spoiled))
        self.kl.append(told["kl"])
        self.kl_of_token.append(told["kl"] / told["answer_length"])
        self.length.append(told["answer_length"])
        if len(self.kl) < WATCHED:
            return None
        kl, kl_of_token = sum(self.kl) / WATCHED, sum(self.kl_of_token) / WATCHED
        if kl < LOWEST_KL:
            return problem("ppo-negative-kl", "stage.temperature", step=step, kl=f"{kl:.2f}", batches=WATCHED)
        if kl_of_token > HIGHEST_KL:
            return problem(
                "ppo-runaway-kl", "stage.init_kl_coef", step=step, kl=f"{kl_of_token:.1f}", batches=WATCHED
            )
        if max(self.length) <= SHORTEST and told["ended"] > 0.5:
            return problem("ppo-empty-answers", "stage.reward_model", step=step, batches=WATCHED)
        return None


def _prompts_of(rows: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    return {"prompt_ids": [row["prompt_ids"] for row in rows]}


def _padded_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention, both (B, longest), so that all end in the same place."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(seen, device=device)


def ppo_trainer(
    spec: RunSpec,
    run: RunDir,
    model: Any,
    tokenizer: Any,
    data: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> Trainer:
    """PPO on prompts, with a finished reward model. Raises Refusal if that cannot judge this model's answers."""
    arguments = TrainingArguments(
        **common_arguments(spec, run, measured="validation" in data) | {"remove_unused_columns": False}
    )
    reward = reward_of(Path(spec.stage.reward_model), tokenizer)
    generation = generation_config(spec, model, tokenizer)
    cast = ActorCritic(model)
    return ours(PpoTrainer(
        cast, spec.stage, reward, generation, run, args=arguments, train_dataset=data["train"],
        eval_dataset=data.get("validation"), processing_class=tokenizer,
        callbacks=[*callbacks, *early_stopping(spec)], optimizers=(loraplus(spec, arguments, cast), None),
    ))  # fmt: skip
