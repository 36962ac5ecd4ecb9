"""GRPO: several answers to each question, each learned from by how much better than its group it is.

Shao et al. 2024 (arXiv:2402.03300); the loss dapo is from Yu et al. 2025 (arXiv:2503.14476). TRL does the arithmetic.
This module provides its inputs (our own token ids, our rewards), and makes runs resumable at any step.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from trl import GRPOConfig

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir
from engine.spec.stage_settings import Grpo
from engine.spec.steps import examples_per_step
from engine.worker.generation.reasoning_marks import AnswerTexts
from engine.worker.runtime.process_lifecycle import rank
from engine.worker.runtime.sharding import shards_weights
from engine.worker.training.context import TrainingContext, reference_adapter
from engine.worker.training.grpo_prompts import PreparedPromptsTrainer
from engine.worker.training.image_batches import has_images, images_of_model
from engine.worker.training.result import generation_config
from engine.worker.training.rewards import Answer, ScoreFunction, check_references, score_function
from engine.worker.training.samples import SAMPLES_PER_STEP, Sample, samples_are_due, write_samples

MAX_EMPTY_ROUNDS = 5  # of only empty answers end a run
ALIKE_ROUNDS_BEFORE_WARNING = 20  # in which all answers of each group have the same score are reported


def grpo_trainer(context: TrainingContext) -> Trainer:
    """The rows are `prompt_ids` (ending with the generation prompt), `prompt` (messages as JSON) and `answer`.

    Raises Refusal if there are too few of them for one step, or none that a reward can compare with.
    """
    spec, model, tokenizer = context.spec, context.model, context.tokenizer
    stage, rows = spec.stage, len(context.data["train"])
    assert isinstance(stage, Grpo)
    questions = examples_per_step(spec) // stage.num_generations
    if rows < questions:
        raise Refusal(problem("too-few-prompts", "training.gradient_accumulation_steps", rows=rows, needed=questions))
    if has_images(context) and "reward_model" in stage.rewards:
        raise Refusal(problem("reward-model-images", "stage.rewards"))
    for split in context.data.values():
        check_references(list(stage.rewards), split["answer"])
    rewards = [_trl_reward_function(name, score_function(name, stage, tokenizer), tokenizer) for name in stage.rewards]
    compared = stage.grpo_beta and spec.method.kind != "lora"
    arguments = context.arguments(
        GRPOConfig,
        num_generations_eval=1,  # validation uses the mean reward, for which one answer to each question is enough
        **(_reference_arguments(model) if compared else {}),
    )
    # An answer ends with the token with which the template ends a turn.
    model.generation_config.eos_token_id = generation_config(spec, model, tokenizer).eos_token_id
    # What TRL calls the prompt are our ids.
    renamed = replace(context, data={name: _with_trl_columns(split) for name, split in context.data.items()})
    with reference_adapter(spec, model):
        trainer = renamed.trainer(
            GroupTrainer,
            arguments,
            images=images_of_model(context) if has_images(context) else None,
            run=context.run,
            sample_steps=stage.sample_steps,
            reward_funcs=rewards,
        )
    if compared and not shards_weights():
        _take_weights(trainer.accelerator.unwrap_model(trainer.ref_model), model)
    return trainer


def _reference_arguments(model: Any) -> dict[str, Any]:
    """How TRL loads the reference model; it copies an adapter by itself."""
    config = copy.deepcopy(model.config)  # with the spec's changes in it
    dtype = next((weight.dtype for weight in model.parameters() if not weight.requires_grad), torch.float32)
    return {"model_init_kwargs": {"config": config, "use_safetensors": True, "dtype": dtype}}


def _take_weights(reference: Any, model: Any) -> None:
    """Give the reference the model's weights of the start: a copy of the trained ones, in the same type, so that it
    computes the same; and the frozen ones themselves, which are then in memory once."""
    for name, weight in model.named_parameters():
        reference.get_parameter(name).data = weight.data.clone() if weight.requires_grad else weight.data


def _with_trl_columns(rows: Any) -> Any:
    return rows.rename_columns({"prompt": "messages", "prompt_ids": "prompt"})


def _trl_reward_function(name: str, score: ScoreFunction, tokenizer: Any) -> Callable[..., list[float | None]]:
    """A reward function as TRL calls it; its name becomes that of the curve."""
    answers = AnswerTexts(tokenizer)

    def function(
        prompts: list[list[int]],
        completions: list[str],  # without the marks of reasoning, if these are special tokens
        completion_ids: list[list[int]],
        messages: list[str],
        answer: list[str | None],
        **_: Any,
    ) -> list[float | None]:
        conversations = map(json.loads, messages)
        opened, texts = map(answers.opens, prompts), answers.texts(completion_ids)
        rows = zip(conversations, prompts, texts, completion_ids, answer, opened, strict=True)
        return score([Answer(*row) for row in rows])

    function.__name__ = name
    return function


class GroupTrainer(PreparedPromptsTrainer):
    """TRL's trainer on prompts that are already token ids, resumable at any step.

    The Trainer stores the random state in the checkpoint; this class adds the answers of an unfinished round, the step
    within it, and the order of the prompts.
    """

    args: GRPOConfig

    def __init__(self, run: RunDir, sample_steps: int, **arguments: Any):
        super().__init__(**arguments)
        self.run, self.sample_steps = run, sample_steps
        self.answer_texts = AnswerTexts(self.processing_class)
        self.empty = self.alike = 0  # rounds of answers in a row

    @property
    def round_steps(self) -> int:
        """Forward passes that learn from the answers of one round."""
        assert self.args.steps_per_generation is not None  # TRL's configuration has filled it in
        return self.args.steps_per_generation * self.num_iterations

    def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
        """Generate answers without dropout."""
        training = self.model.training
        self.model.eval()
        try:
            return super()._generate_single_turn(*arguments, **keywords)
        finally:
            self.model.train(training)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._record_answers(inputs, output["completion_ids"].tolist())
        return output

    def _record_answers(self, inputs: list[dict[str, Any]], answers: list[list[int]]) -> None:
        """Keep a few of the newest `answers` to `inputs` for the page; end the run if those of all ranks, which TRL's
        logs contain, have been empty for a while."""
        texts = list(self._logs["completion"])
        step = self.state.global_step + 1  # the first step that learns from them
        if rank() == 0 and samples_are_due(step, self.sample_steps, self.num_iterations):
            write_samples(self.run, step, self._samples(inputs, answers))
        self.empty = 0 if any(text.strip() for text in texts) else self.empty + 1
        if self.empty == MAX_EMPTY_ROUNDS:
            raise Refusal(problem("answers-empty", "training.learning_rate", rounds=MAX_EMPTY_ROUNDS))
        alike = self._metrics["train"]["frac_reward_zero_std"][-1] == 1
        self.alike = self.alike + 1 if alike else 0
        if self.alike and self.alike % ALIKE_ROUNDS_BEFORE_WARNING == 0 and rank() == 0:
            print(problem("rewards-alike", "stage.rewards", rounds=self.alike).text(), flush=True)

    def _samples(self, inputs: list[dict[str, Any]], answers: list[list[int]]) -> Iterator[Sample]:
        """Answers to as many different questions as possible, with their scores: on rank 0, its own rows are the first
        ones in TRL's logs."""
        padding = self.answer_texts.tokenizer.pad_token_id
        texts = self.answer_texts.texts([[token for token in answer if token != padding] for answer in answers])
        logged: Any = self._logs["rewards"]
        scores = {name: list(values) for name, values in logged.items()}
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        for row in range(0, len(inputs), max(len(inputs) // SAMPLES_PER_STEP, 1)):
            rewards = {name: values[row] for name, values in scores.items()}
            known = [value * weights[name] for name, value in rewards.items() if value == value]
            score, opened = sum(known) if known else None, self.answer_texts.opens(inputs[row]["prompt"])
            yield Sample(json.loads(inputs[row]["messages"]), texts[row], score, rewards, opened)

    # -- a resumed run continues as if nothing had happened

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return EpochSeededSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In the middle of a round, its answers belong to the checkpoint, too."""
        super()._save_checkpoint(model, trial)
        if self._step % self.round_steps:
            assert self.args.output_dir is not None
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self._buffered_inputs, self._answers_in(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            kept = self._answers_in(Path(checkpoint))
            if kept.exists():
                self._buffered_inputs = torch.load(kept, map_location=self.accelerator.device, weights_only=True)

    def _answers_in(self, checkpoint: Path) -> Path:
        return checkpoint / f"answers-{self.accelerator.process_index}.pt"


class EpochSeededSampler(Sampler):
    """TRL's order of the prompts, but that of an epoch depends on its number and not on the epochs before."""

    def __init__(self, repeated: Any, epoch: Callable[[], int]):
        self.repeated, self.epoch = repeated, epoch

    def __iter__(self) -> Iterator[int]:
        if self.repeated.shuffle:
            self.repeated.generator.manual_seed(self.repeated.seed + self.epoch())
        return iter(self.repeated)

    def __len__(self) -> int:
        return len(self.repeated)
