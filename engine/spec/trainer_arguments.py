"""The arguments of each stage's configuration class that are not settings of their own: `extra` in a spec."""

from __future__ import annotations

import difflib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.spec.explanations import MAX_PROBLEMS_SAID, shortened
from engine.spec.run_spec import RunSpec, fields

TRAINER_ARGUMENTS_FILE = Path(__file__).parent / "trainer_arguments.json"


@cache
def trainer_arguments() -> dict[str, Any]:
    """Stage → name → types of the arguments of its configuration class ("int|null"), as recorded by
    `python -m engine.worker.training.trainer_arguments`."""
    return json.loads(TRAINER_ARGUMENTS_FILE.read_text(encoding="utf-8"))


# Settings of a stage that its configuration class has under another name.
RENAMED_ARGUMENTS: dict[str, dict[str, str]] = {
    "grpo": {"grpo_beta": "beta", "grpo_loss": "loss_type", "max_new_tokens": "max_completion_length"},
}
# Arguments of the configuration class that the spec has elsewhere, or that the run folder determines.
RESERVED_ARGUMENTS = {
    "output_dir": "",
    "resume_from_checkpoint": "",
    "overwrite_output_dir": "",
    "do_train": "",
    "do_eval": "",
    "do_predict": "",
    "local_rank": "",
    "disable_tqdm": "",
    "remove_unused_columns": "",
    "dataset_kwargs": "",
    "model_init_kwargs": "model",
    "chat_template_path": "model.chat_template",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "use_cpu": "hardware.device",
    "save_strategy": "logging.save_steps",
    "eval_strategy": "logging.eval_steps",
    "logging_strategy": "logging.logging_steps",
    "assistant_only_loss": "stage.train_on",
    "completion_only_loss": "stage.train_on",
    "padding_free": "data.packing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "metric_for_best_model": "logging.load_best_model_at_end",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "run_name": "name",
    "data_seed": "training.seed",
    "ignore_data_skip": "",
    "push_to_hub": "",
    "hub_token": "",
    "hub_model_id": "",
    "hub_strategy": "",
    "hub_private_repo": "",
    "hub_always_push": "",
    "hub_revision": "",
    "logging_first_step": "",
    "logging_nan_inf_filter": "",
    "trackio_space_id": "",
    "trackio_bucket_id": "",
    "trackio_static_space_id": "",
    "greater_is_better": "logging.load_best_model_at_end",
    "save_only_model": "",
    "enable_jit_checkpoint": "",
    # A stage has its own names for these, or creates the data itself.
    "loss_weights": "stage.sft_weight",
    "truncation_mode": "data.too_long",
    "precompute_ref_log_probs": "",
    "precompute_ref_batch_size": "",
    "dataset_num_proc": "",
    "disable_dropout": "method.lora_dropout",
    "ref_model_init_kwargs": "",
    "sync_ref_model": "",
    "eos_token": "",
    "pad_token": "",
    "trust_remote_code": "model.trust_remote_code",
    "reward_weights": "stage.rewards",
    "num_generations_eval": "",
    "generation_batch_size": "training.gradient_accumulation_steps",
    "chat_template_kwargs": "model.chat_template",
    "steps_per_generation": "training.gradient_accumulation_steps",
    "log_completions": "stage.sample_steps",
    "log_completions_hub_repo": "",
    "num_completions_to_print": "stage.sample_steps",
    "log_unique_prompts": "stage.sample_steps",
    "use_transformers_continuous_batching": "",
    "use_transformers_paged": "",
    # Athanor decides how a model is distributed over GPUs; most of these could also name a file.
    "deepspeed": "hardware",
    "fsdp": "hardware.strategy",
    "fsdp_config": "hardware.strategy",
    "accelerator_config": "hardware",
    "parallelism_config": "hardware",
}


def extra_problems(spec: RunSpec) -> list[Problem]:
    known = trainer_arguments()[spec.stage.kind]
    paths = [path for path in fields() if path.split(".")[0] in ("training", "logging")]
    paths += [f"stage.{name}" for name in type(spec.stage).model_fields]
    renamed = RENAMED_ARGUMENTS.get(spec.stage.kind, {})
    path_by_argument = {renamed.get(path.rsplit(".", 1)[-1], path.rsplit(".", 1)[-1]): path for path in paths}
    problems: list[Problem] = []
    for number, (name, value) in enumerate(spec.extra.items()):
        if len(problems) >= MAX_PROBLEMS_SAID:
            return [*problems, problem("spec-more-problems", "extra", count=len(spec.extra) - number)]
        if name in path_by_argument or name in RESERVED_ARGUMENTS:
            problems.append(
                problem(
                    "extra-has-a-field",
                    "extra",
                    name=name,
                    place=path_by_argument.get(name) or RESERVED_ARGUMENTS[name] or "—",
                )
            )
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            problems.append(
                problem(
                    "extra-unknown",
                    "extra",
                    name=name,
                    config=f"{spec.stage.kind} config",
                    hint=near[0] if near else "—",
                )
            )
        elif not _has_type(value, known[name]):
            types = known[name].replace("|", ", ")
            problems.append(problem("extra-type", "extra", name=name, types=types, given=shortened(value)))
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(problem("spec-type-finite", f"extra.{name}", given=value))
    return problems


def _has_type(value: Any, types: str) -> bool:
    kind = {"NoneType": "null"}.get(type(value).__name__, type(value).__name__)
    allowed = types.split("|")
    return "any" in allowed or kind in allowed or (kind == "int" and "float" in allowed)
