"""The configuration of `accelerate launch` for a strategy, as the text of accelerate.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.spec.hardware_settings import Fsdp2, TrainingHardware, Zero2, Zero3
from engine.spec.strategies import ZERO_STAGES
from engine.spec.yaml_text import read_yaml, write_yaml

BASE = Path(__file__).parent / "accelerate.yaml"  # for a single process; the others differ from it as below
COPIES, PARTS = "parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size"


def configuration(chosen: TrainingHardware, remark: str) -> str:
    """The text of accelerate.yaml for several processes whose strategy is not "auto", with a remark at its top."""
    plain: dict[str, Any] = read_yaml(BASE.read_text(encoding="utf-8")) | {"num_processes": chosen.num_processes}
    if isinstance(chosen.strategy, Fsdp2):
        plain |= {"distributed_type": "FSDP", "fsdp_config": _fsdp_config(chosen.strategy)}
        plain |= _divided_copies(chosen.copies, chosen.num_processes)
    elif isinstance(chosen.strategy, (Zero2, Zero3)):
        plain |= {"distributed_type": "DEEPSPEED", "deepspeed_config": _deepspeed_config(chosen.strategy)}
    else:
        plain |= {"distributed_type": "MULTI_GPU"}  # also on the CPU, where the environment says so
    comment = "".join(f"# {line}\n" for line in remark.splitlines())
    return comment + write_yaml(plain)


def _fsdp_config(strategy: Fsdp2) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # each layer of the model is a unit
        "fsdp_reshard_after_forward": strategy.reshard_after_forward,
        "fsdp_offload_params": strategy.cpu_offload,
        # Sharded ones would leave the Trainer's `save_model` with nothing to write.
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        # The model's own is used: with that of FSDP, the saved adapter of a LoRA training would be empty.
        "fsdp_activation_checkpointing": False,
        "fsdp_cpu_ram_efficient_loading": False,
    }


def _deepspeed_config(strategy: Zero2 | Zero3) -> dict[str, Any]:
    """What accelerate has an option for; `engine.worker.training.zero` adds the rest."""
    place = "cpu" if strategy.cpu_offload else "none"
    return {
        "zero_stage": ZERO_STAGES[strategy.kind],
        "offload_optimizer_device": place,
        "offload_param_device": place if isinstance(strategy, Zero3) else "none",
        "zero3_init_flag": False,  # the model is divided once it is loaded
        "zero3_save_16bit_model": True,  # "16 bits" means whole weights, in the type in which they are trained
        "deepspeed_multinode_launcher": "standard",
    }


def _divided_copies(copies: int, processes: int) -> dict[str, Any]:
    """How many copies of the model there are (HSDP), and in how many parts each is divided; {} for a single one."""
    if not 1 < copies < processes:
        return {}
    return {"parallelism_config": {COPIES: copies, PARTS: processes // copies}}


def with_processes(text: str, processes: int, machines: int) -> str:
    """The text of an accelerate.yaml for other numbers of processes and machines. Copies of the model, one for each
    machine, become a single one if they could no longer be divided."""
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    plain: dict[str, Any] = read_yaml(text) | {"num_processes": processes}
    copies = machines if plain.pop("parallelism_config", None) else 1
    return comment + write_yaml(plain | _divided_copies(copies, processes))


def is_fsdp(text: str) -> bool:
    """Whether the text of an accelerate.yaml is a configuration of FSDP."""
    return read_yaml(text).get("distributed_type") == "FSDP"


def is_deepspeed(text: str) -> bool:
    """Whether it is one of DeepSpeed."""
    return read_yaml(text).get("distributed_type") == "DEEPSPEED"


def is_hybrid(text: str) -> bool:
    """Whether it divides several copies of the model, each on a machine of its own (HSDP)."""
    return "parallelism_config" in read_yaml(text)
