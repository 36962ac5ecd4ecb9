"""Converters of LLaMA-Factory keys about training, logging and generation."""

from __future__ import annotations

from typing import Any, get_args

from engine.importer.draft import Draft, as_list, converters_by_name
from engine.importer.table import EMPTY_VALUES, reasons
from engine.spec.run_spec import Logging

OPTIMIZER_ARGUMENTS = {
    "galore": {
        "galore_rank": ("rank", 16),
        "galore_update_interval": ("update_proj_gap", 200),
        "galore_scale": ("scale", 2.0),
        "galore_proj_type": ("proj_type", "std"),
    },
    "apollo": {
        "apollo_rank": ("rank", 16),
        "apollo_update_interval": ("update_proj_gap", 200),
        "apollo_scale": ("scale", 32.0),
        "apollo_proj": ("proj", "random"),
        "apollo_proj_type": ("proj_type", "std"),
        "apollo_scale_type": ("scale_type", "channel"),
    },
}


def run_kind(draft: Draft, name: str, value: Any) -> None:
    """The purpose (training or prediction) has already been read."""
    if name == "do_predict" and value is True:
        draft.missing(name, value, "also-predicts")
    else:
        draft.needless(name, value, "start")


# ------------------------------------------------------------------------------------------ preferences, PPO


def preference_loss(draft: Draft, name: str, value: Any) -> None:
    if str(value).startswith("kto"):
        draft.missing(name, value, "kto-pair")
    else:
        draft.put("stage.loss_type", value, name)


def label_smoothing(draft: Draft, name: str, value: Any) -> None:
    loss = draft.settings.get("pref_loss", draft.settings.get("dpo_loss", "sigmoid"))
    if value == 0:
        draft.needless(name, value, "nothing-asked")
    elif loss == "sigmoid":
        draft.missing(name, value, "smoothing")
    else:
        draft.put("stage.label_smoothing", value, name)


def reference_model(draft: Draft, name: str, value: Any) -> None:
    same = value == draft.settings.get("model_name_or_path")
    if same and draft.settings.get("adapter_name_or_path") in EMPTY_VALUES:
        draft.needless(name, value, "reference-same")
    else:
        draft.missing(name, value, "reference")


def ppo_buffer_size(draft: Draft, name: str, value: Any) -> None:
    """The number of mini-batches that are filled with answers before learning from them one after another (PPOConfig's
    batch_size = per_device_train_batch_size × gradient_accumulation_steps × ppo_buffer_size)."""
    draft.put("stage.num_mini_batches", int(value), name)
    if draft.settings.get("gradient_accumulation_steps") is None:
        accumulation(draft, "", 1)


def accumulation(draft: Draft, name: str, value: Any) -> None:
    """Forward passes per step; in PPO, those of all its mini-batches together."""
    buffers = draft.settings.get("ppo_buffer_size") if draft.kind == "ppo" else 1
    several_buffers = isinstance(buffers, int) and isinstance(value, int) and buffers > 1
    draft.put("training.gradient_accumulation_steps", value * buffers if several_buffers else value, name)


# ------------------------------------------------------------------------------------------ optimizers


def optimizer(draft: Draft, name: str, value: Any) -> None:
    if draft.settings.get("use_galore") is True or draft.settings.get("use_apollo") is True:
        return  # reported through these
    if value in ("adamw_hf", "adamw_torch_npu_fused", "adamw_apex_fused"):
        draft.put("training.optim", "adamw_torch", name)
        draft.differs(name, value, reasons()["adamw-hf"])
    else:
        draft.put("training.optim", value, name)


def adafactor(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("training.optim", "adafactor", name)
    else:
        draft.needless(name, value, "nothing-asked")


def galore(draft: Draft, name: str, value: Any) -> None:
    base = str(draft.settings.get("optim", "adamw"))
    kind = "galore_adafactor" if "adafactor" in base else "galore_adamw_8bit" if "8bit" in base else "galore_adamw"
    _projected(draft, name, value, "galore", kind)


def apollo(draft: Draft, name: str, value: Any) -> None:
    _projected(draft, name, value, "apollo", "apollo_adamw")


def _projected(draft: Draft, name: str, value: Any, family: str, kind: str) -> None:
    """An optimizer with low-rank gradients: transformers has both, with their numbers in `optim_args`."""
    if value is not True:
        draft.needless(name, value, "nothing-asked")
        return
    layerwise = draft.settings.get(f"{family}_layerwise") is True
    draft.put("training.optim", kind + "_layerwise" * layerwise, name)
    targets = as_list(draft.settings.get(f"{family}_target", "all"))
    draft.put("extra.optim_target_modules", "all-linear" if targets == ["all"] else targets, f"{family}_target")
    numbers = {ours: draft.settings.get(theirs, usual) for theirs, (ours, usual) in OPTIMIZER_ARGUMENTS[family].items()}
    draft.put("extra.optim_args", ",".join(f"{key}={number}" for key, number in numbers.items()), f"{family}_rank")


def dft_loss(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("extra.loss_type", "dft", name)
    else:
        draft.needless(name, value, "nothing-asked")


# ------------------------------------------------------------------------------------------ training, logging


def max_steps(draft: Draft, name: str, value: Any) -> None:
    """Like 0, -1 means none in transformers."""
    if isinstance(value, (int, float)) and value <= 0:
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.max_steps", value, name)


def warmup(draft: Draft, name: str, value: Any) -> None:
    if value == 0 and draft.settings.get("warmup_ratio"):
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.warmup_steps", value, name)


def warmup_ratio(draft: Draft, name: str, value: Any) -> None:
    before = draft.settings.get("warmup_steps") or 0
    if isinstance(before, (int, float)) and before > 0:
        draft.needless(name, value, "warmed")
    elif not 0 <= float(value) < 1:
        raise ValueError(f"0 ≤ {name} < 1")
    else:
        draft.put("training.warmup_steps", float(value), name)


def data_seed(draft: Draft, name: str, value: Any) -> None:
    if value == draft.settings.get("seed", 42):
        draft.needless(name, value, "data-seed")
    else:
        draft.missing(name, value, "data-seed")


def use_cpu(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("hardware.device", "cpu", name)
    else:
        draft.needless(name, value, "nothing-asked")


def step_interval(draft: Draft, name: str, value: Any) -> None:
    """A number of steps. transformers also accepts a share of all steps, which is known only after the rows are
    counted."""
    if isinstance(value, float) and 0 < value < 1:
        draft.missing(name, value, "whole-number")
    else:
        draft.put(f"logging.{name}", value, name)


def save_total_limit(draft: Draft, name: str, value: Any) -> None:
    draft.put("logging.save_total_limit", None if value == 0 else value, name)


def logging_strategy(draft: Draft, name: str, value: Any) -> None:
    draft.needless(name, value, "by-steps")


def eval_strategy(draft: Draft, name: str, value: Any) -> None:
    if value in ("no", False):  # YAML reads a bare no as false
        draft.needless(name, "no", "measured-anyway")
        return
    draft.put("logging.eval_strategy", value, name)
    if value == "steps" and draft.settings.get("eval_steps") in EMPTY_VALUES:  # transformers' rule
        draft.put("logging.eval_steps", draft.settings.get("logging_steps", 500))


def save_strategy(draft: Draft, name: str, value: Any) -> None:
    draft.put("logging.save_strategy", "no" if value is False else value, name)


def trackers(draft: Draft, name: str, value: Any) -> None:
    (tracker_type,) = get_args(Logging.model_fields["report_to"].annotation)
    known = get_args(tracker_type)
    names = [str(tracker) for tracker in as_list(value) if str(tracker) != "none"]
    for tracker in names:
        if tracker not in known:
            draft.missing(name, tracker, "tracker-unknown")
    before = draft.get("logging.report_to") or []
    draft.put(
        "logging.report_to",
        list(dict.fromkeys([*before, *(tracker for tracker in names if tracker in known)])),
        name,
    )


def swanlab(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        trackers(draft, name, "swanlab")
    else:
        draft.needless(name, value, "nothing-asked")


def run_name(draft: Draft, name: str, value: Any) -> None:
    draft.put("name", str(value), name)


def metric_for_best_model(draft: Draft, name: str, value: Any) -> None:
    if value in ("loss", "eval_loss"):
        draft.needless(name, value, "default-path")
    else:
        draft.missing(name, value, "measure")


def greater_is_better(draft: Draft, name: str, value: Any) -> None:
    if value is False:
        draft.needless(name, value, "default-path")
    else:
        draft.missing(name, value, "measure")


# ------------------------------------------------------------------------------------------ evaluation, export


def do_sample(draft: Draft, name: str, value: Any) -> None:
    if draft.kind == "evaluation" and value is False:
        draft.put("generation.temperature", 0.0, name)
    else:
        draft.needless(name, value, "nothing-asked" if draft.kind == "evaluation" else "answering")


def harness_task(draft: Draft, name: str, value: Any) -> None:
    known = {"mmlu_test": "mmlu", "ceval_validation": "ceval-valid", "cmmlu_test": "cmmlu"}
    draft.put("harness.tasks", [known.get(str(value), str(value))], name)


def export_name(draft: Draft, name: str, value: Any) -> None:
    if draft.kind == "export":
        draft.put("name", str(value).rstrip("/\\").replace("\\", "/").rpartition("/")[2], name)


CONVERTERS = converters_by_name(
    run_kind, preference_loss, label_smoothing, reference_model, ppo_buffer_size, accumulation,
    optimizer, adafactor, galore, apollo, dft_loss, max_steps, warmup, warmup_ratio, data_seed,
    use_cpu, step_interval, save_total_limit, logging_strategy, eval_strategy, save_strategy, trackers,
    swanlab, run_name, metric_for_best_model, greater_is_better, do_sample, harness_task, export_name,
)  # fmt: skip
