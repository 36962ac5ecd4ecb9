"""Check each number of a spec against the number of rows and this machine: pure arithmetic, in bounded time.

`exceeded` keeps a run from starting: it is impossible, or does not fit. `doubts` are only shown: estimates, and
settings that run but do not have the expected effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.core import hardware
from engine.core.problems import Problem, problem
from engine.data.datasets import count_rows, read_dataset_info
from engine.data.mixing import held_out, repeats
from engine.launch.workspace import Workplace
from engine.models.facts import ModelFacts, inspect_model
from engine.models.quantized_weights import DEQUANTIZED
from engine.models.safetensors_headers import names_in_line
from engine.models.structure import structure_of
from engine.models.vocabulary import new_tokens, vocabulary
from engine.preflight import memory
from engine.preflight.checks import disk_needed
from engine.preflight.image_memory import image_bytes, learns_in_tower
from engine.preflight.machine_limits import core_warnings, process_problems, unknown_nodes, worker_problems
from engine.preflight.model_checks import (
    adapter_matrices,
    model_is_readable,
    quantizes_experts,
    trained_parameters,
)
from engine.preflight.strategy import loading_warnings
from engine.spec.run_spec import RunSpec
from engine.spec.schedules import SCHEDULES_WITHOUT_WARMUP, VALIDATION_SCHEDULES, warmup_problems
from engine.spec.steps import examples_per_step, optimizer_steps

SHORT_ROW_TOKENS = 16  # hardly any row has fewer tokens than this
LOGIT_BYTES = 6  # bytes per vocabulary entry and validated token: the logits, and what is computed from them
MIN_VALIDATION_ROWS = 2  # minimum number of rows for a meaningful validation


@dataclass(frozen=True)
class RowCounts:
    """How many rows of each data set are trained on per epoch, and held out; repeated according to their weights."""

    there: dict[str, int]
    trained: dict[str, int]
    measured: int

    @property
    def total(self) -> int:
        return sum(self.trained.values())


def row_counts(spec: RunSpec) -> RowCounts | None:
    """Counted as preparation splits them (`engine.worker.data.splits`); None if one of the data sets cannot be
    counted."""
    catalogue = {dataset.name: dataset for dataset in read_dataset_info(Path(spec.data.dataset_dir))[0]}
    there: dict[str, int] = {}
    for name in (*spec.data.datasets, *spec.data.eval_datasets):
        if name not in catalogue or catalogue[name].problem:
            return None
        count = count_rows(catalogue[name])
        there[name] = min(count, spec.data.max_samples or count)
    rows = {name: there[name] for name in spec.data.datasets}
    aside = held_out(spec.data, rows)
    left = {name: max(count - aside[name], 0) for name, count in rows.items()}
    often = repeats(spec.data, left)
    trained = {name: count * int(often[name]) + round(count * (often[name] % 1)) for name, count in left.items()}
    measured = sum(min(aside[name], rows[name]) for name in rows)
    measured += sum(there[name] for name in spec.data.eval_datasets)
    return RowCounts(there, trained, measured)


def limit_problems(spec: RunSpec, workplace: Workplace, known_problems: list[Problem]) -> list[Problem]:
    """What prevents the run from doing what the numbers say. `known_problems` have already been found and are not
    repeated."""
    wrong_fields = {problem.field for problem in known_problems}
    problems: list[Problem] = []
    rows = None if any(field.startswith("data.") for field in wrong_fields) else row_counts(spec)
    if rows:
        problems += _row_problems(spec, rows)
        if not problems:
            problems += _step_problems(spec, optimizer_steps(spec, rows.total), rows.measured)
    if model_is_readable(wrong_fields) and not wrong_fields & {
        "model.resize_embeddings",
        "model.add_tokens",
        "stage.reward_model",
    }:
        model = inspect_model(spec.model.model_name_or_path)
        # Data that cannot be read, or must not be, is not searched for images either.
        measured = spec if rows else spec.change("data.datasets", [])
        problems += process_problems(measured, model) + _batch_problems(measured, model, rows)
        # A disk too small for the few checkpoints that `engine.preflight.checks` counts is one problem, not two.
        if rows and not problems and not any(problem.code == "disk-full" for problem in known_problems):
            problems += _checkpoint_problems(spec, workplace, optimizer_steps(spec, rows.total))
    return problems + worker_problems(spec)


def limit_warnings(spec: RunSpec, known_problems: list[Problem]) -> list[Problem]:
    """What is worth a warning but keeps no run from starting. `known_problems` do keep it."""
    wrong_fields = {problem.field for problem in known_problems}
    warnings: list[Problem] = []
    rows = None if any(field.startswith("data.") for field in wrong_fields) else row_counts(spec)
    if rows and not known_problems:
        warnings += _step_warnings(spec, rows) + _validation_warnings(spec, rows)
    warnings += core_warnings(spec)
    schedule = spec.training.lr_scheduler_type
    if schedule in SCHEDULES_WITHOUT_WARMUP and spec.training.warmup_steps:
        warnings.append(problem("warmup-not-here", "training.warmup_steps", schedule=schedule))
    readable = model_is_readable(wrong_fields) and not known_problems
    model = inspect_model(spec.model.model_name_or_path) if readable else None
    warnings += unknown_nodes(spec, model)
    if model:
        warnings += _memory_warnings(spec, model, rows) + _padding_warnings(model) + _expert_warnings(spec, model)
        warnings += _dequantization_warnings(spec, model) + _token_warnings(spec, model)
        warnings += _sharing_warnings(spec, model) + loading_warnings(spec, model)
        if learns_in_tower(spec, model) and image_bytes(spec, model, half=True) is None:
            warnings.append(problem("memory-without-tower", "vision.tower"))
        rank, width = getattr(spec.method, "r", 0), model.hidden_size or 0
        if width and rank > width:
            warnings.append(problem("rank-beyond-width", "method.r", given=rank, width=width))
    return warnings


def _dequantization_warnings(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """A warning if weights take more space in memory than on disk because they are dequantized while they are
    loaded."""
    loaded = memory.weight_bytes(spec, model, len(hardware.planned_gpus()))
    if model.quantized not in DEQUANTIZED or not loaded:
        return []
    values = {"how": model.quantized, "stored": memory.size_text(model.bytes), "size": memory.size_text(loaded)}
    return [problem("weights-dequantized", "model.model_name_or_path", **values)]


def _token_warnings(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """A warning about added tokens that the tokenizer already has: they stay unchanged."""
    new = new_tokens(model, spec.model.added_tokens)
    known = [token for token in spec.model.added_tokens if token not in new]
    return [problem("tokens-known", "model.add_tokens", tokens=names_in_line(known))] if known else []


def _expert_warnings(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """The warning that a quantized mixture of experts stays nearly as large as before."""
    experts, kind = memory.unquantized_expert_parameters(spec, model), spec.model.quantization.kind
    if kind == "none" or not experts or not model.parameters:
        return []
    code = "experts-not-quantized" if quantizes_experts(spec) else "adapted-experts-not-quantized"
    share, size = experts / model.parameters, 2 * experts / 2**30
    return [problem(code, "model.quantization", kind=kind, share=f"{share:.0%}", size=f"{size:.1f}")]


def _sharing_warnings(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """The warning that an adapter on layers that share their weights cannot be merged."""
    if spec.method.kind != "lora":
        return []
    adapted = adapter_matrices(spec, model)
    names = next((names for names in structure_of(model).sharing if not adapted.keys().isdisjoint(names)), None)
    return [problem("adapter-not-mergeable", "method.target_modules", first=names[0], second=names[1])] if names else []


# ------------------------------------------------------------------------------------------ rows and steps


def _row_problems(spec: RunSpec, rows: RowCounts) -> list[Problem]:
    share, problems = spec.data.validation_share, []
    for name, count in rows.there.items():
        if name in spec.data.datasets and share and 0 < count < MIN_VALIDATION_ROWS:
            problems.append(problem("validation-takes-all", "data.validation_share", name=name, rows=count))
    if problems:
        return problems
    if spec.data.validation_rows and rows.measured and not rows.total:
        values = {"given": spec.data.validation_rows, "rows": rows.measured, "largest": rows.measured - 1}
        return [problem("validation-takes-rows", "data.validation_rows", **values)]
    if any(rows.there.values()) and not rows.total:
        weights = ", ".join(f"{name}: {weight:g}" for name, weight in spec.data.datasets.items())
        return [problem("weights-leave-nothing", "data.datasets", weights=weights)]
    batch = spec.training.per_device_train_batch_size
    if spec.extra.get("dataloader_drop_last") is True and 0 < rows.total < batch * spec.hardware.num_processes:
        values = {
            "rows": rows.total,
            "given": batch,
            "largest": max(rows.total // spec.hardware.num_processes, 1),
        }
        return [problem("last-batch-dropped", "training.per_device_train_batch_size", **values)]
    if spec.stage.kind == "grpo" and rows.total and not optimizer_steps(spec, rows.total):
        questions = examples_per_step(spec) // spec.stage.num_generations
        return [problem("fewer-questions-than-step", "data.datasets", rows=rows.total, questions=questions)]
    return []


def _step_problems(spec: RunSpec, steps: int, measured: int) -> list[Problem]:
    """What would have to happen after the last step."""
    logging, problems = spec.logging, []
    if not spec.training.max_steps or spec.training.warmup_steps < 1:  # otherwise engine.spec.run_spec has reported it
        problems += warmup_problems(spec, steps)
    needs_validation = [
        name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(logging, name)
    ]
    needs_validation += (
        [spec.training.lr_scheduler_type] if spec.training.lr_scheduler_type in VALIDATION_SCHEDULES else []
    )
    if needs_validation and measured and logging.eval_strategy == "steps" and logging.eval_steps > steps:
        values = {"given": logging.eval_steps, "steps": steps, "what": needs_validation[0]}
        problems.append(problem("validation-never", "logging.eval_steps", **values))
    return problems


def _step_warnings(spec: RunSpec, rows: RowCounts) -> list[Problem]:
    """A step with more examples than exist uses all existing ones."""
    examples, batch = examples_per_step(spec), spec.training.per_device_train_batch_size
    if rows.total >= examples or spec.stage.kind in ("ppo", "grpo"):
        return []
    alone = batch * spec.hardware.num_processes
    if alone > rows.total:
        largest = max(rows.total // spec.hardware.num_processes, 1)
        values = {"given": batch, "rows": rows.total, "largest": largest}
        return [problem("batch-beyond-rows", "training.per_device_train_batch_size", **values)]
    values = {"given": examples, "rows": rows.total, "largest": max(rows.total // alone, 1)}
    return [problem("step-beyond-rows", "training.gradient_accumulation_steps", **values)]


def _validation_warnings(spec: RunSpec, rows: RowCounts) -> list[Problem]:
    logging, problems = spec.logging, []
    ways = ("eval_datasets", "validation_rows", "validation_share")
    field = f"data.{next((name for name in ways if getattr(spec.data, name)), ways[-1])}"
    if 0 < rows.measured < MIN_VALIDATION_ROWS:
        problems.append(problem("validation-of-few", field, rows=rows.measured))
    steps = optimizer_steps(spec, rows.total) if rows.total else 0
    by_steps = rows.measured and logging.eval_strategy == "steps"
    if by_steps and logging.eval_steps > steps:
        problems.append(problem("validation-after-end", "logging.eval_steps", given=logging.eval_steps, steps=steps))
    patience = logging.early_stopping_patience
    if by_steps and patience and steps // logging.eval_steps <= patience:
        values = {
            "patience": patience,
            "times": steps // logging.eval_steps,
            "eval_steps": logging.eval_steps,
        }
        problems.append(problem("stopping-never", "logging.early_stopping_patience", **values))
    return problems


def _padding_warnings(model: ModelFacts) -> list[Problem]:
    words = vocabulary(model.path)
    if words.rows and words.eos is None and words.pad is None:
        return [problem("tokenizer-without-pad", "model.model_name_or_path")]
    return []


# ------------------------------------------------------------------------------------------ memory and disk


def _batch_problems(spec: RunSpec, model: ModelFacts, rows: RowCounts | None) -> list[Problem]:
    """A batch that cannot fit even if all of its rows are short."""
    short = spec.change("data.max_length", min(spec.data.max_length, SHORT_ROW_TOKENS))
    return _batch_size_problems(short, spec, model, rows, "batch-beyond-memory")


def _memory_warnings(spec: RunSpec, model: ModelFacts, rows: RowCounts | None) -> list[Problem]:
    """What does not fit if rows have the maximum length."""
    problems = _batch_size_problems(spec, spec, model, rows, "batch-may-not-fit") or _length_problems(spec, model)
    return problems + _eval_batch_problems(spec, model, rows)


def _batch_size_problems(
    counted: RunSpec, spec: RunSpec, model: ModelFacts, rows: RowCounts | None, code: str
) -> list[Problem]:
    path, batch_size = "training.per_device_train_batch_size", spec.training.per_device_train_batch_size
    # No batch has more rows than exist; of generated answers, there can be any number.
    largest = (
        min(batch_size, rows.total) if rows and rows.total and spec.stage.kind not in ("ppo", "grpo") else batch_size
    )
    room = memory.available_memory(spec)
    if room is None or largest == 1:
        return []

    def fits(batch: int) -> bool:
        need = memory.memory_needed(counted.change(path, batch), model, len(hardware.planned_gpus()))
        return need is None or need.total <= room.bytes

    if fits(largest) or not fits(1):
        return []
    values = {"given": batch_size, "length": counted.data.max_length, "whole": memory.size_text(room.bytes)}
    return [problem(code, path, **values, largest=_largest_that_fits(fits, largest))]


def _length_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    room = memory.available_memory(spec)
    if room is None:
        return []

    def fits(length: int) -> bool:
        changed = spec.change("data.max_length", length).change("training.per_device_train_batch_size", 1)
        need = memory.memory_needed(changed, model, len(hardware.planned_gpus()))
        return need is None or need.total <= room.bytes

    if fits(spec.data.max_length):
        return []
    values = {"given": spec.data.max_length, "whole": memory.size_text(room.bytes)}
    if not fits(8):
        return [problem("model-may-not-fit", "model.model_name_or_path", whole=memory.size_text(room.bytes))]
    return [
        problem(
            "length-may-not-fit",
            "data.max_length",
            **values,
            largest=_largest_that_fits(fits, spec.data.max_length),
        )
    ]


def _eval_batch_problems(spec: RunSpec, model: ModelFacts, rows: RowCounts | None) -> list[Problem]:
    """The logits of all words at each token of a validation batch, which training does not hold at once."""
    batch_size, room = spec.training.per_device_eval_batch_size, memory.available_memory(spec)
    if not rows or not rows.measured or room is None or not model.vocab_size:
        return []
    row_bytes = spec.data.max_length * model.vocab_size * LOGIT_BYTES
    if min(batch_size, rows.measured) * row_bytes <= room.bytes:
        return []
    values = {
        "given": batch_size,
        "whole": memory.size_text(room.bytes),
        "largest": max(int(room.bytes / row_bytes), 1),
    }
    return [problem("eval-batch-may-not-fit", "training.per_device_eval_batch_size", **values)]


def _checkpoint_problems(spec: RunSpec, workplace: Workplace, steps: int) -> list[Problem]:
    """All checkpoints that a run keeps, if it keeps more than the few that `engine.preflight.checks` counts."""
    kept, weights = spec.logging.save_total_limit, trained_parameters(spec) or 0
    if spec.logging.save_strategy == "no":
        return []
    epochs = math.ceil(spec.training.num_train_epochs)
    saved = max(steps // spec.logging.save_steps, 1) if spec.logging.save_strategy == "steps" else epochs
    count, free = min(kept or saved, saved), hardware.free_disk(workplace.saves)
    first_bytes = disk_needed(spec.change("logging.save_total_limit", 1), weights)
    further_bytes = disk_needed(spec.change("logging.save_total_limit", 2), weights) - first_bytes
    if not further_bytes or first_bytes + further_bytes * (count - 1) <= free:
        return []
    values = {
        "count": count,
        "needed": memory.size_text(first_bytes + further_bytes * (count - 1)),
        "free": memory.size_text(free),
    }
    largest = max(int((free - first_bytes) / further_bytes) + 1, 1)
    return [problem("checkpoints-beyond-disk", "logging.save_total_limit", **values, largest=largest)]


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest number below `most` that fits; 1 always does."""
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
