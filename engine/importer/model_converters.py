"""Converters of LLaMA-Factory keys about the model and the method."""

from __future__ import annotations

import math
import re
from typing import Any

from engine.importer.draft import Draft, as_list, converters_by_name
from engine.importer.table import EMPTY_VALUES, reasons
from engine.spec.method_settings import METHODS

CONTEXT_LENGTH_KEY = " context"  # not a key of theirs: the context length of the model, if it is known


# ------------------------------------------------------------------------------------------ model


def adapter(draft: Draft, name: str, value: Any) -> None:
    folders = as_list(value)
    if len(folders) > 1:
        draft.missing(name, value, "several-adapters")
    elif draft.settings.get("create_new_adapter") is True:
        draft.missing(name, value, "new-adapter")
    elif folders:
        draft.put("model.adapter_path", str(folders[0]), name)


def subfolder(draft: Draft, name: str, value: Any) -> None:
    """The folder of the adapter inside adapter_name_or_path."""
    above = as_list(draft.settings.get("adapter_name_or_path"))
    if len(above) == 1:
        draft.put("model.adapter_path", f"{above[0]}/{value}", name, beside=True)
    else:
        draft.missing(name, value, "several-adapters")


def split_special_tokens(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.needless(name, value, "spelled")
    else:
        draft.differs(name, value, reasons()["spelled"])


def attention_implementation(draft: Draft, name: str, value: Any) -> None:
    kinds = {
        "fa2": "flash_attention_2",
        "sdpa": "sdpa",
        "disabled": "eager",
        "auto": "auto",
        "True": "flash_attention_2",
        "False": "auto",
        "flash_attention_2": "flash_attention_2",
        "eager": "eager",
        "flex_attention": "flex_attention",
    }
    if str(value) == "fa3":
        draft.missing(name, value, "flash-3")
    else:
        draft.put("model.attn_implementation", kinds.get(str(value), value), name)


def rope(draft: Draft, name: str, value: Any) -> None:
    """LLaMA-Factory computes the factor itself (model/model_utils/rope.py): the context that the rows need ÷ the
    model's own, rounded up; and does nothing if they fit."""
    if value not in ("linear", "dynamic", "yarn"):
        draft.missing(name, value, "rope-llama3")
        return
    context = draft.settings.get(CONTEXT_LENGTH_KEY)
    length = draft.settings.get("cutoff_len", 2048)
    if not context or not isinstance(length, int):
        draft.put("model.rope_scaling", {"kind": value, "factor": 2.0}, name)
        draft.differs(name, value, reasons()["rope-unknown"])
    elif length <= context:
        draft.needless(name, value, "rope-fits")
    else:
        draft.put("model.rope_scaling", {"kind": value, "factor": float(math.ceil(length / context))}, name)


def disable_gradient_checkpointing(draft: Draft, name: str, value: Any) -> None:
    draft.put("training.gradient_checkpointing", (not value) if isinstance(value, bool) else value, name)


def gradient_checkpointing(draft: Draft, name: str, value: Any) -> None:
    draft.put("training.gradient_checkpointing", value, name)


def remote_code(draft: Draft, name: str, value: Any) -> None:
    draft.needless(name, value, "remote-code")


def quantization_bit(draft: Draft, name: str, value: Any) -> None:
    if str(value) in ("4", "8"):
        draft.put("model.quantization.kind", f"{value}bit", name)
    else:
        draft.missing(name, value, "bits")


def quantization_method(draft: Draft, name: str, value: Any) -> None:
    if value in ("bnb", "bitsandbytes", "BITS_AND_BYTES"):
        draft.needless(name, value, "default-path")
    elif draft.settings.get("quantization_bit") in EMPTY_VALUES:
        draft.needless(name, value, "switched-off")
    else:
        draft.differs(name, value, reasons()["quantizer"])


# ------------------------------------------------------------------------------------------ method


def method(draft: Draft, name: str, value: Any) -> None:
    if value in METHODS:
        draft.put("method.kind", value, name)
    else:
        draft.missing(name, value, "method-unknown")


def targets(draft: Draft, name: str, value: Any) -> None:
    names = as_list(value)
    if names == ["all"]:
        draft.put("method.target_modules", ["all-linear"], name)
    elif any(re.search(r"[*+?^$()\[\]|\\]", str(target)) for target in names):
        draft.missing(name, value, "expression")
    else:
        draft.put("method.target_modules", names, name)


def vision_part(draft: Draft, name: str, value: Any) -> None:
    """Parts of a vision model that are frozen by default; those that are not get what the method gives the others."""
    if value is not False:
        draft.needless(name, value, "nothing-asked")
        return
    path = {"freeze_vision_tower": "vision.tower", "freeze_multi_modal_projector": "vision.projector"}[name]
    draft.put(path, "adapter" if draft.settings.get("finetuning_type", "lora") == "lora" else "trained", name)


def language_part(draft: Draft, name: str, value: Any) -> None:
    if value is not True:
        draft.needless(name, value, "nothing-asked")
        return
    draft.put("vision.language_part", "frozen", name)
    if name == "train_mm_proj_only":
        draft.put("vision.projector", "trained", name)


def positive_number(draft: Draft, name: str, value: Any) -> None:
    """LLaMA Board writes 0 for none."""
    if value == 0:
        draft.needless(name, value, "nothing-asked")
    else:
        path = {"loraplus_lr_ratio": "method.loraplus_lr_ratio"}.get(name, "training.neftune_noise_alpha")
        draft.put(path, value, name)


def pissa(draft: Draft, name: str, value: Any) -> None:
    if value is not True:
        draft.needless(name, value, "nothing-asked")
        return
    draft.put("method.init_lora_weights", "pissa", name)
    iterations = draft.settings.get("pissa_iter")
    if iterations == -1:
        draft.needless("pissa_iter", iterations, "default-path")
    elif iterations is not None:
        draft.differs("pissa_iter", iterations, reasons()["exact-svd"])


def pure_bf16(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("training.precision", "bf16", name)
        draft.differs(name, value, reasons()["bf16-weights"])
    else:
        draft.needless(name, value, "nothing-asked")


def bf16(draft: Draft, name: str, value: Any) -> None:
    _precision(draft, name, value, "bf16")


def fp16(draft: Draft, name: str, value: Any) -> None:
    _precision(draft, name, value, "fp16")


def _precision(draft: Draft, name: str, value: Any, kind: str) -> None:
    if value is True:
        draft.put("training.precision", kind, name)
    elif isinstance(value, bool) or value == "auto":
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.precision", value, name)


def disable_shuffling(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("data.group_by_length", False)
        draft.put("extra.train_sampling_strategy", "sequential", name)
    else:
        draft.needless(name, value, "nothing-asked")


CONVERTERS = converters_by_name(
    adapter, subfolder, split_special_tokens, attention_implementation, rope,
    disable_gradient_checkpointing, gradient_checkpointing, remote_code, quantization_bit,
    quantization_method, method, targets, vision_part, language_part,
    positive_number, pissa, pure_bf16, bf16, fp16, disable_shuffling,
)  # fmt: skip
