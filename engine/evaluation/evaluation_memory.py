"""Estimate the memory that an evaluation needs: that of the largest of the models that it loads one after another.

Arithmetic over headers and settings. Prompts are assumed to be of ordinary length, except the judge's, which are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.core import hardware
from engine.core.problems import Problem, problem
from engine.evaluation.evaluation_spec import EvaluationSpec, as_training
from engine.evaluation.judge import judge_model
from engine.evaluation.trained_results import model_part_of_whole, trained_result
from engine.launch.command import on_cpu
from engine.models.facts import inspect_model
from engine.preflight import memory
from engine.preflight.memory import CPU_LIBRARY_BYTES, CUDA_CONTEXT_BYTES, available_memory, size_text
from engine.spec.model_settings import Model

MAX_LOGITS = 1 << 27  # fp32 values in the logits of one forward pass, unless a single row has more
PROMPT_TOKENS = 1024  # of a question, as assumed here
JUDGE_PROMPT_TOKENS = 512  # of the judge's instructions and the criterion
LOGITS_BYTES = 8  # of each value: fp32, and its logarithm


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded for a part of the evaluation. `tokens`: of a row, prompt and answer; `is_judge`: it is
    loaded once the others are freed."""

    part: Model
    adapters: tuple[Path, ...]
    tokens: int
    is_judge: bool = False


def memory_needed(spec: EvaluationSpec) -> int:
    """The peak memory in bytes; 0 if the weights of one of its models cannot be counted."""
    needs = [_bytes(spec, model) for model in loaded_models(spec)]
    return int(max(needs)) if needs and all(needs) else 0


def doubts(spec: EvaluationSpec, _problems: list[Problem]) -> list[Problem]:
    """A warning for each model that may not fit into the memory."""
    room = available_memory(as_training(spec))
    if room is None or not room.bytes:
        return []
    warnings = []
    for model in loaded_models(spec):
        if (needed := _bytes(spec, model)) > room.bytes:
            code = "judge-may-not-fit" if model.is_judge else "evaluate-may-not-fit"
            name = Path(model.part.model_name_or_path).name
            warnings.append(problem(code, name=name, needed=size_text(needed), there=size_text(room.bytes)))
    return warnings


def loaded_models(spec: EvaluationSpec) -> Iterator[LoadedModel]:
    """The base with its adapters, each full model, and the judge: one after another."""
    results = [result for folder in spec.results if (result := trained_result(folder))]
    tokens = PROMPT_TOKENS + spec.generation.max_new_tokens
    adapters = tuple(result.folder for result in results if result.adapter)
    if spec.with_base or adapters:
        yield LoadedModel(spec.model, adapters, tokens)
    for result in results:
        if not result.adapter:
            yield LoadedModel(model_part_of_whole(result), (), tokens)
    if spec.judge.model.strip():
        judge = judge_model(spec.judge)
        tokens = JUDGE_PROMPT_TOKENS + spec.judge.max_input_tokens + spec.judge.max_reason_tokens
        yield LoadedModel(judge.model, (Path(judge.adapter),) if judge.adapter else (), tokens, is_judge=True)


def _bytes(spec: EvaluationSpec, model: LoadedModel) -> float:
    """Weights, adapters, keys and values of a batch of answers, logits, and libraries; 0 if that is unknown."""
    facts = inspect_model(model.part.model_name_or_path)
    training, gpu_count = as_training(spec, model.part), len(hardware.planned_gpus())
    weights = memory.weight_bytes(training, facts, gpu_count) if facts and facts.parameters else 0
    if not weights:
        return 0.0
    cpu = on_cpu(training, gpu_count)
    tokens = min(model.tokens, facts.context_length or model.tokens)
    rows = spec.generation.batch_size * tokens
    cache = rows * (4 if cpu else 2) * (facts.layers or 0) * (facts.cache_width or 0)
    logits = min(MAX_LOGITS, rows * (facts.vocab_size or 0)) * LOGITS_BYTES
    adapters = sum(file.stat().st_size for folder in model.adapters for file in folder.glob("*.safetensors"))
    return weights + adapters + cache + logits + (CPU_LIBRARY_BYTES if cpu else CUDA_CONTEXT_BYTES)
