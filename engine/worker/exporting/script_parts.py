"""The parts of a plain script that depend on the settings: how the model is loaded, what of it is trained, and the
trainer with its arguments."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from engine.core.rundir import RunDir
from engine.spec.method_settings import Freeze, Lora
from engine.spec.run_spec import RunSpec
from engine.worker.data.lengths import LengthGroupedSampler, lengths_of
from engine.worker.exporting.own_source import OwnSource
from engine.worker.exporting.python_text import Code, call, literal, literal_at
from engine.worker.models.loading import (
    DTYPES,
    is_reward_model,
    keep_in_fp32,
    loading_dtype,
    lora_arguments,
    modules_in_training,
    precision,
    score_at_the_end,
)
from engine.worker.models.mixed_precision import state_in_fp32, train_in_fp32
from engine.worker.models.quantization import quantization_config
from engine.worker.models.structure import model_class
from engine.worker.training import preference, reward, sft
from engine.worker.training.callbacks import LoggingRules
from engine.worker.training.context import exact_adapter
from engine.worker.training.image_batches import passing
from engine.worker.training.trainers import common_arguments, stage_arguments

# Arguments that say how the studio shows and keeps a run, or that the script has otherwise.
OF_THE_STUDIO = ("output_dir", "run_name", "disable_tqdm", "save_total_limit", "use_cpu", "dataloader_pin_memory")
DEVICE = '{"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None'


@dataclass(frozen=True)
class StageCode:
    """How a stage trains: its configuration class and the changes to it, its trainer and collator as expressions, and
    more arguments of the trainer. `kind` is the class behind the trainer."""

    config: type[TrainingArguments]
    trainer: str
    kind: type[Trainer]
    collator: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def stage_code(spec: RunSpec, own: OwnSource, columns: Sequence[str]) -> StageCode:
    """How the stage of `spec` trains on rows with these columns."""
    kind = spec.stage.kind
    if kind in ("pt", "sft"):
        weighted = "weights" in columns
        trainer, collator = "SFTTrainer", "DataCollatorForLanguageModeling"
        if weighted:
            trainer = f'{own.add(passing)}({own.add(sft.WeightedSFTTrainer)}, "weights")'
            collator = own.add(sft.WeightedBatches)
        padding_free = ", padding_free=True" if spec.data.packing else ""
        return StageCode(
            SFTConfig, trainer, SFTTrainer, f"{collator}(pad_token_id=tokenizer.pad_token_id{padding_free})",
            {"max_length": spec.data.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}},
        )  # fmt: skip
    pairs = "DataCollatorForPreference(tokenizer.pad_token_id)"
    if kind == "rm":
        collator = f"{own.add(reward.ConversationCollator)}(tokenizer.pad_token_id)"
        trainer = own.add(reward.PreparedRewardTrainer)
        return StageCode(RewardConfig, trainer, RewardTrainer, collator, {"remove_unused_columns": False})
    if kind == "dpo":
        return StageCode(DPOConfig, own.add(preference.PreparedDpoTrainer), DPOTrainer, pairs)
    if kind == "kto":
        own.add(preference.PreparedKtoTrainer)
        collator = f'{own.add(preference.KlCollator)}(tokenizer.pad_token_id, spares=list(islice(rows["train"], 16)))'
        changes = {"train_sampling_strategy": "sequential"}
        return StageCode(KTOConfig, "PreparedKtoTrainer", KTOTrainer, collator, changes)
    settings = call(type(spec.stage).__name__, spec.stage.model_dump(), column=0)
    own.definitions |= {name: f"{name} = SimpleNamespace" for name in ("Orpo", "Simpo")}
    trainer = own.add(preference.ReferenceFreeTrainer)
    return StageCode(
        TrainingArguments, trainer, Trainer, pairs, {"remove_unused_columns": False}, {"stage": Code(settings)}
    )


def model_code(spec: RunSpec, path: str, model: Any, own: OwnSource, *, on_cpu: bool, pinned: bool) -> dict[str, Any]:
    """The template's values for loading the model and choosing what is trained."""
    method, scorer = spec.method, is_reward_model(spec)
    dtype = loading_dtype(spec.change("model.model_name_or_path", path))
    changes = _config_changes(spec, model.config)
    quantization = quantization_config(spec, DTYPES[precision(spec)])
    trust = {"trust_remote_code": True} if spec.model.trust_remote_code else {}
    attention = spec.model.attn_implementation
    loading = call(
        f"{model_class(model.config, scorer=scorer).__name__}.from_pretrained",
        {
            **({"config": Code("config")} if changes else {}),
            **({"revision": Code("REVISION")} if pinned else {}),
            "dtype": dtype,
            **({"quantization_config": quantization_code(quantization)} if quantization else {}),
            **({} if attention == "auto" else {"attn_implementation": attention}),
            **({} if on_cpu else {"device_map": Code(DEVICE)}),
            "use_safetensors": True,
            **trust,
        },
        first=["MODEL"],
        column=12,
    )
    if scorer:
        own.add(keep_in_fp32)
        own.add(score_at_the_end)
    if quantization:
        own.add(exact_adapter)
    mixed = not isinstance(method, Lora) and dtype != torch.float32
    if mixed:
        own.add(train_in_fp32)
        own.add(state_in_fp32)
    continues = spec.model.adapter_path if isinstance(method, Lora) else None
    return {
        "trust": ", trust_remote_code=True" if trust else "",
        "config_changes": changes,
        "loading": loading,
        "quantized": bool(quantization),
        "scores": scorer,
        "continues": continues,
        "dropout": getattr(method, "lora_dropout", 0.0),
        "lora": _lora_code(spec, method, model) if isinstance(method, Lora) and not continues else "",
        "trained_modules": literal(modules_in_training(spec, method, model)) if isinstance(method, Freeze) else "",
        "mixed": mixed,
        "saving": _saving_code(method, mixed=mixed),
    }


def _config_changes(spec: RunSpec, config: Any) -> list[str]:
    """Lines that change the configuration of the model as the spec does; `config` has been changed."""
    lines = ["config.num_labels = 1"] if is_reward_model(spec) else []
    if spec.model.rope_scaling.kind != "none":
        names = ("rope_parameters", "max_position_embeddings")
        lines += [f"config.{name} = {literal_at(getattr(config, name), 14 + len(name))}" for name in names]
    return lines


def quantization_code(quantization: BitsAndBytesConfig) -> Code:
    """The expression that makes the same configuration."""
    bits = ("load_in_4bit", "load_in_8bit")  # properties, of private attributes
    values = {name: getattr(quantization, name) for name in bits} | vars(quantization)
    return Code(call("BitsAndBytesConfig", _changed(BitsAndBytesConfig(), values), column=0))


def _changed(defaults: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the attributes of `defaults`; private ones are left out."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and value != getattr(defaults, name, dataclasses.MISSING)
    }


def _lora_code(spec: RunSpec, method: Lora, model: Any) -> str:
    arguments = lora_arguments(spec, method, model)
    return call("LoraConfig", {"r": method.r} | _changed(LoraConfig(), arguments), column=8)


def _saving_code(method: Any, *, mixed: bool) -> str:
    what = 'model.save_pretrained(HERE / "result"'
    if isinstance(method, Lora):
        return f'{what}, selected_adapters=["default"])'
    return f"{what}, state_dict=state_in_fp32(model))" if mixed else f"{what})"


def training_code(
    spec: RunSpec, run: RunDir, stage: StageCode, own: OwnSource, *, measured: bool, on_cpu: bool
) -> dict[str, Any]:
    """The template's values for the trainer's arguments and the trainer."""
    compares = spec.stage.kind in ("dpo", "kto")
    reference = ("adapter" if spec.model.adapter_path else "base") if spec.method.kind == "lora" else "copy"
    if compares:
        own.add(preference.disable_base_dropout)
        if reference == "copy":
            own.add(preference.frozen_copy)
    arguments = trainer_arguments(spec, run, stage, measured=measured, on_cpu=on_cpu)
    sampling = spec.extra.get("train_sampling_strategy", "random")
    grouped = (
        spec.data.group_by_length
        and not spec.data.packing
        and stage.kind._get_train_sampler is Trainer._get_train_sampler
        and sampling == "random"
    )
    if grouped:
        own.add(LengthGroupedSampler)
        own.add(lengths_of)
    ratio, patience = getattr(spec.method, "loraplus_lr_ratio", None), spec.logging.early_stopping_patience
    more = dict(stage.arguments)
    if compares and reference == "copy":
        more["ref_model"] = Code("reference")
    rules = [Code(f"{own.add(LoggingRules)}()")]
    more["callbacks"] = rules + ([Code(f"EarlyStoppingCallback({patience})")] if patience else [])
    if ratio:
        more["optimizers"] = Code("(optimizer, None)")
    trainer = call(
        stage.trainer,
        {
            "model": Code("model"),
            "args": Code("arguments"),
            "train_dataset": Code('rows["train"]'),
            **({"eval_dataset": Code('rows["validation"]')} if measured else {}),
            "processing_class": Code("tokenizer"),
            "data_collator": Code("collator"),
            **more,
        },
        column=18,
    )
    return {
        "arguments": call(stage.config.__name__, arguments, column=16),
        "collator": stage.collator,
        "trainer": trainer,
        "optimizer": _optimizer_code(spec, ratio) if ratio else "",
        "reference": reference if compares else "",
        # A continued adapter has the initialization that its own configuration names.
        "initialization_kept": compares
        and reference != "copy"
        and (bool(spec.model.adapter_path) or getattr(spec.method, "init_lora_weights", "default") != "default"),
        "sampling_restored": sampling if "train_sampling_strategy" in stage.changes else "",
        "grouped": grouped,
    }


def trainer_arguments(spec: RunSpec, run: RunDir, stage: StageCode, *, measured: bool, on_cpu: bool) -> dict[str, Any]:
    """The arguments of the configuration class that differ from its defaults: those that the run has, apart from where
    the studio keeps it and how it shows it."""
    values = common_arguments(spec, run, measured=measured) | stage_arguments(spec) | dict(stage.changes)
    defaults = {field.name: field.default for field in dataclasses.fields(stage.config)}
    values = {name: value for name, value in values.items() if name not in OF_THE_STUDIO}
    differing = {name: value for name, value in values.items() if value != _plain(defaults.get(name))}
    if spec.hardware.num_processes > 1:
        differing.setdefault("ddp_find_unused_parameters", False)
    return {
        "output_dir": Code('str(HERE / "checkpoints")'),
        **differing,
        "save_total_limit": spec.logging.save_total_limit,
        **({"use_cpu": True, "dataloader_pin_memory": False} if on_cpu else {}),
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _optimizer_code(spec: RunSpec, ratio: float) -> str:
    arguments = {
        "lr": spec.training.learning_rate,
        "loraplus_lr_ratio": ratio,
        "loraplus_weight_decay": spec.training.weight_decay,
    }
    return call("create_loraplus_optimizer", arguments, column=16, first=["model", "kind"], last=["**keywords"])
