"""Converters of keys about how a model is divided among GPUs (FSDP, DeepSpeed) → `hardware.strategy`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.importer.draft import Draft, converters_by_name
from engine.importer.table import reasons
from engine.spec.run_spec import RunSpec

STRATEGY = "hardware.strategy"
# Words of transformers' `fsdp`, without their prefix in accelerate → whether weights are released after the forward
# pass.
RELEASES_WEIGHTS = {"full_shard": True, "shard_grad_op": False}
# Keys of a configuration of FSDP that are always as Athanor has them, or that FSDP2 no longer has.
NEEDLESS_KEYS = (
    "auto_wrap", "auto_wrap_policy", "backward_prefetch", "backward_prefetch_policy", "cpu_ram_efficient_loading",
    "final_state_dict_type", "forward_prefetch", "limit_all_gathers", "min_num_params", "state_dict_type",
    "sync_module_states", "transformer_layer_cls_to_wrap", "use_orig_params", "version",
)  # fmt: skip
# The stage of ZeRO in the usual names of DeepSpeed's configurations: ds_z3_config.json, zero3_bf16.json.
ZERO_STAGE = re.compile(r"(?:^|[^a-z])z(?:ero)?_?([0-3])")


def fsdp(draft: Draft, name: str, value: Any) -> None:
    """`fsdp: full_shard auto_wrap`, `[full_shard, offload]`, true."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value if isinstance(value, list) else []
    if value is False or value == "":
        draft.needless(name, value, "nothing-asked")
        return
    _divide(draft, name, value)
    for word in words:
        if word in RELEASES_WEIGHTS:
            _set(draft, "reshard_after_forward", RELEASES_WEIGHTS[word])
        elif word == "offload":
            _set(draft, "cpu_offload", True)
        elif word not in ("auto_wrap", "true", "True"):
            draft.missing(name, word, "sharding")


def fsdp_config(draft: Draft, name: str, value: Any) -> None:
    """transformers' key; by itself it does not turn FSDP on."""
    if draft.settings.get("fsdp"):
        fsdp_settings(draft, name, value)
    else:
        draft.needless(name, value, "switched-off")


def fsdp_settings(draft: Draft, name: str, value: Any) -> None:
    """axolotl's `fsdp_config`, which turns FSDP on: a mapping, with or without the prefix `fsdp_` of its keys."""
    if not isinstance(value, Mapping):
        draft.missing(name, value, "sharding-file")
        return
    _divide(draft, name, value)
    for key, inner in value.items():
        fsdp_key(draft, f"{name}.{key}", inner)


def fsdp_version(draft: Draft, name: str, value: Any) -> None:
    _divide(draft, name, value)
    if value != 2:
        draft.differs(name, value, reasons()["fsdp2"])


def fsdp_key(draft: Draft, name: str, value: Any) -> None:
    """One key of a configuration of FSDP."""
    key = name.rpartition(".")[2].removeprefix("fsdp_")
    on = str(value).lower() == "true"
    if key in ("offload_params", "cpu_offload"):
        _set(draft, "cpu_offload", on)
    elif key == "reshard_after_forward":
        _set(draft, key, RELEASES_WEIGHTS.get(str(value).lower(), on))
    elif key == "sharding_strategy" and str(value).lower() in RELEASES_WEIGHTS:
        _set(draft, "reshard_after_forward", RELEASES_WEIGHTS[str(value).lower()])
    elif key == "activation_checkpointing":
        draft.put("training.gradient_checkpointing", on, name, beside=True)
    elif key in NEEDLESS_KEYS:
        draft.needless(name, value, "sharded-by-layer")
    else:
        draft.missing(name, value, "sharding")


def deepspeed(draft: Draft, name: str, value: Any) -> None:
    """DeepSpeed's configuration, or the usual name of a file with one: ZeRO-2 and ZeRO-3 divide what FSDP2 does without
    and with releasing the weights after the forward pass."""
    if isinstance(value, Mapping):
        zero = value.get("zero_optimization") or {}
        stage, offload = zero.get("stage", 0), any(key.startswith("offload_") for key in zero)
    else:
        match = ZERO_STAGE.search(str(value).rpartition("/")[2].lower())
        stage, offload = int(match[1]) if match else None, "offload" in str(value).lower()
    if stage is None:
        draft.missing(name, value, "sharding-file")
    elif stage == 0:
        draft.needless(name, value, "nothing-asked")
    else:
        _put_zero(draft, name, value, int(stage), offload)


def zero_stage(draft: Draft, name: str, value: Any) -> None:
    """The flag of `accelerate launch`."""
    if int(value) == 0:
        draft.needless(name, value, "nothing-asked")
    else:
        _put_zero(draft, name, value, int(value), offload=False)


def offload_device(draft: Draft, name: str, value: Any) -> None:
    """The flags of `accelerate launch` for DeepSpeed."""
    if value == "cpu":
        _divide(draft, name, value)
        _set(draft, "cpu_offload", True)
    else:
        draft.missing(name, value, "sharding")


def _put_zero(draft: Draft, name: str, value: Any, stage: int, offload: bool) -> None:
    _divide(draft, name, value)
    _set(draft, "reshard_after_forward", stage == 3)
    if offload:
        _set(draft, "cpu_offload", True)
    draft.differs(name, value, reasons()["zero"])


def _divide(draft: Draft, name: str, value: Any) -> None:
    """Choose FSDP2, unless nothing is trained."""
    if draft.spec_type is RunSpec:
        draft.put(f"{STRATEGY}.kind", "fsdp2", name, beside=True)
    else:
        draft.needless(name, value, "other-purpose")


def _set(draft: Draft, key: str, value: bool) -> None:
    if draft.spec_type is RunSpec:
        draft.put(f"{STRATEGY}.{key}", value)


CONVERTERS = converters_by_name(
    fsdp, fsdp_config, fsdp_settings, fsdp_version, fsdp_key, deepspeed, zero_stage, offload_device
)
