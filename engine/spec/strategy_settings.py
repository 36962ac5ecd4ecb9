"""Settings of the strategy: how the processes of a training divide its work and its memory."""

from __future__ import annotations

from typing import Literal

from engine.spec.fields import choices
from engine.spec.parts import Part, setting


class Auto(Part):
    """One process: single. Several: DDP if the run is estimated to fit on each GPU, otherwise FSDP2 if that is
    possible. What was chosen, and why, is in the run's accelerate.yaml."""

    kind: Literal["auto"] = "auto"


class Single(Part):
    """One process on one device."""

    kind: Literal["single"] = "single"


class Ddp(Part):
    """Each GPU holds the whole model and processes its own share of each batch. The fastest if the run fits on each
    GPU."""

    kind: Literal["ddp"] = "ddp"


class Fsdp2(Part):
    """Weights, gradients and optimizer state are divided among the GPUs, and each layer is gathered while it computes.
    For runs that do not fit on each GPU; slower the slower the connection between them."""

    kind: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = setting(
        True,
        "Release after forward",
        "Releases a layer's gathered weights after its forward pass, and gathers them again for the backward pass. Off: "
        "faster, but the whole model is gathered by the end of the forward pass.",
    )
    cpu_offload: bool = setting(
        False,
        "CPU offload",
        "Keeps the weights, gradients and optimizer state in main memory, where the optimizer computes. Needs the least "
        "GPU memory, but is several times slower.",
    )


AnyStrategy = Auto | Single | Ddp | Fsdp2
STRATEGIES = choices(AnyStrategy)
