"""An axolotl YAML → a RunSpec draft. Its keys and their counterparts are in axolotl.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, get_args

from engine.importer import model_converters, training_converters
from engine.importer.converters import CONVERTERS as SHARED_CONVERTERS
from engine.importer.draft import Draft, as_list, converters_by_name
from engine.importer.table import entries, reasons
from engine.importer.training import apply_key
from engine.spec.run_spec import RunSpec, Scheduler

# Defaults that change what is learned and differ from ours (axolotl 0.17, utils/schemas).
DEFAULTS: dict[str, Any] = {
    "data.max_length": 512,
    "data.too_long": "drop",
    "training.num_train_epochs": 1.0,
    "training.gradient_accumulation_steps": 1,
    "training.per_device_train_batch_size": 1,
    "training.gradient_checkpointing": False,
    "method.kind": "full",
    "logging.save_total_limit": 4,
}
STAGE_OF_RL = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo"}
TRL_SETTINGS = {
    "beta": "stage.grpo_beta",
    "max_completion_length": "stage.max_new_tokens",
    "num_generations": "stage.num_generations",
    "temperature": "stage.temperature",
    "top_p": "stage.top_p",
    "epsilon": "stage.epsilon",
    "epsilon_high": "stage.epsilon_high",
    "loss_type": "stage.grpo_loss",
    "num_iterations": "stage.num_iterations",
    "importance_sampling_level": "stage.importance_sampling_level",
    "mask_truncated_completions": "stage.mask_truncated_completions",
}


def is_axolotl_key(name: str) -> bool:
    return name in entries("axolotl")


def is_axolotl(settings: Mapping[str, Any]) -> bool:
    """Whether these are settings of axolotl: only axolotl has `base_model` and `micro_batch_size`."""
    return "base_model" in settings or "micro_batch_size" in settings or "sequence_len" in settings


def training(settings: Mapping[str, Any]) -> Draft:
    """The draft of a training, with axolotl's defaults."""
    kind, unknown = _stage(settings)
    draft = Draft(RunSpec, kind, settings)
    draft.put("stage.kind", kind, "rl" if settings.get("rl") else "")
    for path, value in DEFAULTS.items():
        draft.put(path, value)
    if settings.get("rl") == "ipo":
        draft.put("stage.loss_type", "ipo")
    if unknown:
        draft.missing("rl", unknown, "rl-unknown")
    for name, value in settings.items():
        apply_key(draft, name, value, "axolotl", CONVERTERS)
    return draft


def _stage(settings: Mapping[str, Any]) -> tuple[str, Any]:
    """The stage; unsupported kinds of learning are noted."""
    if settings.get("pretraining_dataset"):
        return "pt", None
    if settings.get("reward_model") is True:
        return "rm", None
    rl = settings.get("rl")
    return STAGE_OF_RL.get(str(rl), "sft"), None if rl in (None, False, *STAGE_OF_RL) else rl


# ------------------------------------------------------------------------------------------ model and adapter


def adapter(draft: Draft, name: str, value: Any) -> None:
    if value in ("lora", "qlora"):
        draft.put("method.kind", "lora", name)
        if value == "qlora":
            draft.put("model.quantization.kind", "4bit")
    else:
        draft.missing(name, value, "method-unknown")
        draft.put("method.kind", "lora")


def four_bits(draft: Draft, name: str, value: Any) -> None:
    _quantize(draft, name, value, "4bit")


def eight_bits(draft: Draft, name: str, value: Any) -> None:
    _quantize(draft, name, value, "8bit")


def _quantize(draft: Draft, name: str, value: Any, kind: str) -> None:
    if value is True:
        draft.put("model.quantization.kind", kind, name)
    else:
        draft.needless(name, value, "nothing-asked")


def bnb_config(draft: Draft, name: str, value: Any) -> None:
    for key, inner in value.items():
        if key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
            draft.put(f"model.quantization.{key}", inner, name)
        else:
            draft.missing(f"{name}.{key}", inner, "own-trainer")


def all_linear(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("method.target_modules", ["all-linear"], name)
    else:
        draft.needless(name, value, "nothing-asked")


def targets(draft: Draft, name: str, value: Any) -> None:
    if draft.settings.get("lora_target_linear") is True:
        draft.needless(name, value, "among-all")
    elif value in ("all-linear", ["all-linear"]):
        draft.put("method.target_modules", ["all-linear"], name)
    else:
        model_converters.targets(draft, name, value)


def init_lora_weights(draft: Draft, name: str, value: Any) -> None:
    kinds = {True: "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
    kind = next((ours for theirs, ours in kinds.items() if value is theirs or value == theirs), None)
    if kind:
        draft.put("method.init_lora_weights", kind, name)
    else:
        draft.missing(name, value, "initial")


def attention_switch(draft: Draft, name: str, value: Any) -> None:
    kinds = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "flex_attention": "flex_attention",
        "eager_attention": "eager",
    }
    if value is True:
        draft.put("model.attn_implementation", kinds[name], name)
    else:
        draft.needless(name, value, "nothing-asked")


def template(draft: Draft, name: str, value: Any) -> None:
    if value in ("chatml", "alpaca"):
        draft.put("model.chat_template", value, name)
    elif str(value).startswith("tokenizer_default"):
        draft.needless(name, value, "default-path")
    else:
        draft.missing(name, value, "template-own")


def gradient_checkpointing(draft: Draft, name: str, value: Any) -> None:
    if isinstance(value, bool):
        draft.put("training.gradient_checkpointing", value, name)
    else:
        draft.put("training.gradient_checkpointing", True, name)
        draft.differs(name, value, reasons()["offload"])


# ------------------------------------------------------------------------------------------ data


def datasets(draft: Draft, name: str, value: Any) -> None:
    names = (
        [_dataset_name(draft, name, entry) for entry in value]
        if isinstance(value, list)
        else [_dataset_name(draft, name, value)]
    )
    draft.put("data.datasets", dict.fromkeys(names, 1.0), name)


def test_datasets(draft: Draft, name: str, value: Any) -> None:
    draft.put("data.eval_datasets", [_dataset_name(draft, name, entry) for entry in value], name)


def _dataset_name(draft: Draft, name: str, entry: Any) -> str:
    """The name of a data set in dataset_info.json: that of its file."""
    settings = entry if isinstance(entry, Mapping) else {"path": entry}
    place = as_list(settings.get("data_files")) or [settings["path"]]
    stem = PurePosixPath(str(place[0]).replace("\\", "/")).name.partition(".")[0]
    why = {language: text.format(name=stem) for language, text in reasons()["registered"].items()}
    kind = f" (type {settings['type']})" if isinstance(settings.get("type"), str) else ""
    draft.differs(name, f"{place[0]}{kind}", why)
    for key in sorted(set(settings) - {"path", "type", "data_files", "ds_type", "name", "split"}):
        draft.missing(f"{name}.{key}", settings[key], "columns-of")
    return stem


def too_long(draft: Draft, name: str, value: Any) -> None:
    draft.put("data.too_long", {"truncate": "cut_end", "raise": "drop"}.get(value, value), name)


# ------------------------------------------------------------------------------------------ stages


def stage_switch(draft: Draft, name: str, value: Any) -> None:
    """Keys from which the stage has already been read."""
    if draft.kind == "sft" and value in (False, ""):
        draft.needless(name, value, "nothing-asked")
    elif name == "reward_model" and draft.kind == "rm":
        draft.origins["stage.kind"] = (name, value)


def dpo_loss(draft: Draft, name: str, value: Any) -> None:
    losses = as_list(value)
    if len(losses) == 1:
        draft.put("stage.loss_type", losses[0], name)
    else:
        draft.missing(name, value, "loss")


def label_smoothing(draft: Draft, name: str, value: Any) -> None:
    loss = (as_list(draft.settings.get("dpo_loss_type")) or ["sigmoid"])[0]
    if loss == "sigmoid" and value:
        draft.missing(name, value, "smoothing")
    else:
        draft.put("stage.label_smoothing", value, name)


def trl(draft: Draft, name: str, value: Any) -> None:
    for key, inner in value.items():
        if key in TRL_SETTINGS and draft.kind == "grpo" and inner is not None:
            draft.put(TRL_SETTINGS[key], inner, f"{name}.{key}")
            draft.origins[TRL_SETTINGS[key]] = (f"{name}.{key}", inner)
        elif key in ("reward_funcs", "reward_weights"):
            draft.missing(f"{name}.{key}", inner, "rewards")
        elif key == "scale_rewards" and draft.kind == "grpo":
            draft.put("stage.scale_rewards", {True: "group", False: "none"}.get(inner, inner))
        else:
            draft.missing(f"{name}.{key}", inner, "own-trainer")


# ------------------------------------------------------------------------------------------ training, logging


def lr_scheduler(draft: Draft, name: str, value: Any) -> None:
    if value in get_args(Scheduler):
        draft.put("training.lr_scheduler_type", value, name)
    else:
        draft.missing(name, value, "schedule")


def cosine_min_lr_ratio(draft: Draft, name: str, value: Any) -> None:
    draft.put("training.lr_scheduler_type", "cosine_with_min_lr")
    draft.put("extra.lr_scheduler_kwargs", {"min_lr_rate": float(value)}, name)


def optimizer_arguments(draft: Draft, name: str, value: Any) -> None:
    text = ",".join(f"{key}={inner}" for key, inner in value.items()) if isinstance(value, Mapping) else value
    draft.put("extra.optim_args", text, name)


def fp32(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("training.precision", "fp32", name)
    else:
        draft.needless(name, value, "nothing-asked")


def tf32(draft: Draft, name: str, value: Any) -> None:
    _unless_auto(draft, name, value)


def torch_compile(draft: Draft, name: str, value: Any) -> None:
    _unless_auto(draft, name, value)


def _unless_auto(draft: Draft, name: str, value: Any) -> None:
    if value == "auto":
        draft.needless(name, value, "default-path")
    else:
        draft.put(f"extra.{name}", value, name)


def per_epoch(draft: Draft, name: str, value: Any) -> None:
    if value == 1:
        draft.put("logging.eval_strategy" if name.startswith("eval") else "logging.save_strategy", "epoch", name)
    elif value == 0:
        draft.needless(name, value, "nothing-asked")
    else:
        draft.missing(name, value, "per-epoch")


def tensorboard(draft: Draft, name: str, value: Any) -> None:
    _add_tracker(draft, name, value, "tensorboard")


def wandb(draft: Draft, name: str, value: Any) -> None:
    _add_tracker(draft, name, value, "wandb")


def mlflow(draft: Draft, name: str, value: Any) -> None:
    _add_tracker(draft, name, value, "mlflow")


def _add_tracker(draft: Draft, name: str, value: Any, tracker: str) -> None:
    if value in (False, ""):
        draft.needless(name, value, "nothing-asked")
        return
    training_converters.trackers(draft, name, tracker)
    if name == "wandb_project":
        draft.missing(name, value, "tracker")


CONVERTERS = SHARED_CONVERTERS | converters_by_name(
    adapter, four_bits, eight_bits, bnb_config, all_linear, targets, init_lora_weights,
    attention_switch, template, gradient_checkpointing, datasets, test_datasets, too_long,
    stage_switch, dpo_loss, label_smoothing, trl, lr_scheduler, cosine_min_lr_ratio,
    optimizer_arguments, fp32, tf32, torch_compile, per_epoch, tensorboard, wandb, mlflow,
)  # fmt: skip
