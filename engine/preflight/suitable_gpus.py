"""Which GPUs of this machine the schedule would give to a run, as far as its settings decide that."""

from __future__ import annotations

from engine.core import hardware
from engine.core.gpu_choice import BF16_CAPABILITY, eligible, emptiest, lacks
from engine.core.hardware import Gpu
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.strategies import LIMITS


def needed_capability(spec: Spec) -> float:
    """The compute capability that every GPU of the run needs; 0 if any will do."""
    if not isinstance(spec, RunSpec):
        return 0.0
    # With "auto", older GPUs train in fp16, which is not offered where a model is divided.
    in_bf16 = ("bf16", "auto") if spec.hardware.strategy.kind in LIMITS else ("bf16",)
    return BF16_CAPABILITY if spec.training.precision in in_bf16 else 0.0


def usable_gpus(spec: Spec, memory: int = 0, *, must_fit: bool = False) -> list[Gpu]:
    """The GPUs that the schedule chooses from for a run whose processes need this many bytes (0: unknown)."""
    chosen = spec.hardware
    return eligible(
        hardware.planned_gpus(),
        chosen.processes_per_machine,
        indices=chosen.devices,
        memory=memory,
        capability=needed_capability(spec),
        must_fit=must_fit,
    )


def enough_fit(spec: Spec, memory: int) -> bool:
    """Whether there are as many GPUs with this memory as the run has processes."""
    return len(usable_gpus(spec, memory, must_fit=True)) >= spec.hardware.processes_per_machine


def likely_gpus(spec: Spec, memory: int = 0) -> list[Gpu]:
    """Those that the run would be given if no other run waited or computed."""
    return emptiest(usable_gpus(spec, memory), spec.hardware.processes_per_machine)


def gpu_without_bf16(spec: Spec) -> Gpu | None:
    """A GPU that the run would have to use although it is too old for bf16; None if there are enough others."""
    chosen = spec.hardware
    gpus = eligible(hardware.planned_gpus(), chosen.processes_per_machine, indices=chosen.devices)
    old = [gpu for gpu in gpus if lacks(gpu, BF16_CAPABILITY)]
    return old[0] if old and len(gpus) - len(old) < chosen.processes_per_machine else None
