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


def allow_sharding_on_cpu() -> None:
    """Let accelerate shard on the CPU if the variable of the tests says so. By itself, it would train with DDP there
    and say nothing (its check of the device in `AcceleratorState`)."""
    if not os.environ.get(SHARD_ON_CPU_VARIABLE):
        return
    from accelerate import state

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
