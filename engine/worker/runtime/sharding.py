"""Whether this training divides its weights among its processes (FSDP2), as its launcher says."""

from __future__ import annotations

import os
from typing import Any

from engine.launch.command import SHARD_ON_CPU_VARIABLE


def shards_weights() -> bool:
    """Whether the launcher's configuration is FSDP's; it passes it on in the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def model_copies() -> int:
    """How many copies of the model are divided, each on a machine of its own (HSDP), as the launcher says."""
    hybrid = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"]) if hybrid else 1


def zero_stage() -> int:
    """The stage of ZeRO with which this training's launcher has started DeepSpeed; 0 without it."""
    used = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]) if used else 0


def allow_sharding_on_cpu() -> None:
    """Let accelerate divide weights on the CPU if the variable of the tests says so. By itself, it would train with DDP
    there and say nothing (its checks of the device in `PartialState` and `AcceleratorState`)."""
    if not os.environ.get(SHARD_ON_CPU_VARIABLE):
        return
    from accelerate import state

    if zero_stage():
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
        _leave_processes_to_deepspeed(state)
        return
    initialize: Any = state.AcceleratorState.__init__

    def initialize_sharding(self: Any, *positional: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
        initialize(self, *positional, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            # The second is where the first is read from again, whenever the state is asked for.
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = initialize_sharding


def _leave_processes_to_deepspeed(state: Any) -> None:
    """Let accelerate's state say of several processes on the CPU what it says of those on GPUs."""
    initialize = state.PartialState.__init__

    def initialize_for_deepspeed(self: Any, *positional: Any, **keywords: Any) -> None:
        initialize(self, *positional, **keywords)
        if zero_stage() and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.DEEPSPEED

    state.PartialState.__init__ = initialize_for_deepspeed
