"""Settings of the devices, and of the strategy: how the processes of a training divide its work and its memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.spec.fields import choices
from engine.spec.parts import OneOf, Part, setting


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


class Offloading(Part):
    """A strategy that divides a training, and can keep its parts in main memory."""

    cpu_offload: bool = setting(
        False,
        "CPU offload",
        "Keeps what is divided in main memory, where the optimizer computes: with FSDP2 and ZeRO-3 weights, gradients "
        "and optimizer state, with ZeRO-2 gradients and optimizer state. Needs the least GPU memory, but is several "
        "times slower.",
    )


class Fsdp2(Offloading):
    """Weights, gradients and optimizer state are divided among the GPUs, and each layer is gathered while it computes.
    For runs that do not fit on each GPU; slower the slower the connection between them."""

    kind: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = setting(
        True,
        "Release after forward",
        "Releases a layer's gathered weights after its forward pass, and gathers them again for the backward pass. "
        "Off: faster, but the whole model is gathered by the end of the forward pass.",
    )
    sharding: Literal["auto", "full", "hybrid"] = setting(
        "auto",
        "Sharding",
        "On several machines. Full: among the GPUs of all of them. Hybrid (HSDP): each machine has a copy, divided "
        "among its own GPUs, and only gradients pass between machines. Auto: hybrid if the run is estimated to fit on "
        "each GPU that way, otherwise full.",
    )


class Zero2(Offloading):
    """DeepSpeed, if it is installed: gradients and optimizer state are divided among the GPUs; each holds the whole
    model."""

    kind: Literal["zero2"] = "zero2"


class Zero3(Offloading):
    """DeepSpeed, if it is installed: weights, gradients and optimizer state are divided among the GPUs, as with
    FSDP2."""

    kind: Literal["zero3"] = "zero3"


AnyStrategy = Auto | Single | Ddp | Fsdp2 | Zero2 | Zero3
STRATEGIES = choices(AnyStrategy)


class Hardware(Part):
    """Devices: where the run computes."""

    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto",
        "Device",
        "Auto: the GPUs if there are any. Use the CPU for small models and experiments.",
    )
    num_processes: int = setting(
        1,
        "Processes",
        "One per device. Four processes on four GPUs mean four times the batch size.",
        ge=1,
        le=1024,
    )
    devices: list[Annotated[int, Field(ge=0, le=1023)]] = setting(
        [], "GPUs", "Indices of the GPUs to use, such as 0, 1, 2, 3. Leave empty for the emptiest ones."
    )

    @property
    def machines(self) -> int:
        """The number of machines."""
        return 1

    @property
    def processes_per_machine(self) -> int:
        """How many of the processes each machine has."""
        return self.num_processes // self.machines


class TrainingHardware(Hardware):
    """Devices: where the run computes."""

    num_machines: int = setting(
        1,
        "Machines",
        "The processes are divided evenly among them. More than one needs the Slurm engine.",
        ge=1,
        le=256,
    )
    strategy: OneOf[AnyStrategy] = setting(
        Auto(), "Strategy", "How several processes divide the work and the memory of a training."
    )

    @property
    def machines(self) -> int:
        """The number of machines."""
        return self.num_machines

    @property
    def can_be_hybrid(self) -> bool:
        """Whether there are several machines, each with several processes to divide a copy among (HSDP)."""
        return self.machines > 1 and self.processes_per_machine > 1

    @property
    def copies(self) -> int:
        """How many copies of the model FSDP2 divides, each among as many processes."""
        return self.machines if isinstance(self.strategy, Fsdp2) and self.strategy.sharding == "hybrid" else 1
