"""Which GPUs a run can use, which of them it gets, and which are used by programs without a lease. Pure; the schedule
and the checks before a start share it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.core.hardware import Gpu

BF16_CAPABILITY = 8.0  # compute capability of the first GPUs with bf16
ALIKE_BYTES = 1 << 30  # GPUs whose free memory differs by less are taken in their order
OTHERS_BYTES = 256 << 20  # a process with less of a GPU's memory has no computation there
UNSEEN_BYTES = 2 << 30  # of used memory that belongs to no visible process; drivers themselves take up to a gigabyte


def eligible(
    gpus: Sequence[Gpu],
    count: int,
    *,
    indices: Collection[int] = (),
    memory: int = 0,
    capability: float = 0.0,
    allowed: Collection[str] | None = None,
    must_fit: bool = False,
) -> list[Gpu]:
    """The GPUs that a run of `count` processes can use: those with these `indices`, otherwise all with at least this
    compute capability and `memory` (bytes of each process). `allowed`: the UUIDs that it is restricted to; None: all.

    If too few have the memory, it does not matter, unless they `must_fit`: the user wants to try it all the same.
    Several processes cannot share slices: each would see only the first.
    """
    usable = [
        gpu
        for gpu in gpus
        if (allowed is None or gpu.uuid in allowed)
        and (gpu.index in indices if indices else not lacks(gpu, capability))
        and not (gpu.is_slice and count > 1)
    ]
    large = [gpu for gpu in usable if not gpu.memory or gpu.memory >= memory]
    return usable if indices or (len(large) < count and not must_fit) else large


def lacks(gpu: Gpu, capability: float) -> bool:
    """Whether a GPU is known to have a lower compute capability."""
    return 0 < gpu.capability < capability


def emptiest(gpus: Sequence[Gpu], count: int) -> list[Gpu]:
    """The `count` GPUs with the most free memory."""
    return sorted(gpus, key=lambda gpu: -(gpu.free // ALIKE_BYTES))[:count]


def others_bytes(gpu: Gpu) -> int | None:
    """The memory in bytes that processes other than runs and servers use on a GPU without a lease; None if there are
    none. Processes that cannot be seen, as from a container, are recognized by what they use."""
    large = [process for process in gpu.processes if process.memory is None or process.memory >= OTHERS_BYTES]
    used = gpu.memory - gpu.free
    if large:
        return sum(process.memory or 0 for process in large) or used
    return used if gpu.memory and used > UNSEEN_BYTES else None
