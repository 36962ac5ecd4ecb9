"""GPUs on which something can be tried: those that nobody uses, leased for that long.

Even a small trial takes half a gigabyte of a GPU, and more where processes communicate. A training that has filled its
GPU would run out of memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.core import leases
from engine.core.gpu_choice import others_bytes
from engine.core.hardware import Gpu
from engine.core.leases import Holder

CHECK = "check"  # the kind of these leases


@dataclass(frozen=True)
class Use:
    """Who uses a GPU: the holder of its lease, or None and the memory in bytes of processes without one."""

    gpu: Gpu
    holder: Holder | None = None
    others: int = 0


@dataclass(frozen=True)
class IdleGpus:
    """The GPUs that have been leased, the descriptors that hold the leases, and the others with their users."""

    gpus: tuple[Gpu, ...]
    descriptors: tuple[int, ...]
    in_use: tuple[Use, ...]


@contextlib.contextmanager
def leased(gpus: Sequence[Gpu], what: str) -> Iterator[IdleGpus]:
    """Lease those of the GPUs that nobody uses. `what`: for whom, as others read it. Raises OSError if the folder of
    the leases cannot be used (`leases.obstacle`)."""
    idle, descriptors, in_use = [], list[int](), []
    with contextlib.ExitStack() as closing:
        for gpu in gpus:
            others = others_bytes(gpu)
            held = leases.take([gpu.uuid], Holder(what, CHECK, owner=CHECK)) if others is None else None
            if held is None:
                in_use.append(use_of(gpu) or Use(gpu, Holder("?", "")))
                continue
            for descriptor in held:
                closing.callback(os.close, descriptor)
            descriptors += held
            idle.append(gpu)
        yield IdleGpus(tuple(idle), tuple(descriptors), tuple(in_use))


def use_of(gpu: Gpu) -> Use | None:
    """Who uses a GPU; None if nobody does."""
    holder = leases.holders().get(gpu.uuid)
    others = None if holder else others_bytes(gpu)
    return None if holder is None and others is None else Use(gpu, holder, others or 0)
