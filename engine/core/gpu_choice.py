"""Which GPUs a run can use, and which of them it gets. Pure; the schedule and the checks before a start share it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.core.hardware import Gpu

BF16_CAPABILITY = 8.0  # compute capability of the first GPUs with bf16
ALIKE_BYTES = 1 << 30  # GPUs whose free memory differs by less are taken in their order


def eligible(
    gpus: Sequence[Gpu],
    count: int,
    *,
    indices: Collection[int] = (),
    memory: int = 0,
    capability: float = 0.0,
    allowed: Collection[str] | None = None,
) -> list[Gpu]:
    """The GPUs that a run of `count` processes can use: those with these `indices`, otherwise all with at least this
    compute capability and `memory` (bytes of each process). `allowed`: the UUIDs that it is restricted to; None: all.

    If too few have the memory, it does not matter: the user wants to try it all the same. Several processes cannot
    share slices: each would see only the first.
    """
    usable = [
        gpu
        for gpu in gpus
        if (allowed is None or gpu.uuid in allowed)
        and (gpu.index in indices if indices else not lacks(gpu, capability))
        and not (gpu.is_slice and count > 1)
    ]
    large = [gpu for gpu in usable if not gpu.memory or gpu.memory >= memory]
    return usable if indices or len(large) < count else large


def lacks(gpu: Gpu, capability: float) -> bool:
    """Whether a GPU is known to have a lower compute capability."""
    return 0 < gpu.capability < capability


def emptiest(gpus: Sequence[Gpu], count: int) -> list[Gpu]:
    """The `count` GPUs with the most free memory."""
    return sorted(gpus, key=lambda gpu: -(gpu.free // ALIKE_BYTES))[:count]
