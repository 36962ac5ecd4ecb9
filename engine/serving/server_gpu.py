"""The GPU of a server: which one it gets, and its lease.

Servers with transformers share a GPU with each other, but not with a run. vLLM takes up nearly all the memory of its
GPU and has it alone. A GPU that is kept for a run that waits is not for a server either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from engine.core import hardware, leases
from engine.core.gpu_choice import others_bytes
from engine.core.hardware import Gpu
from engine.core.leases import Holder
from engine.core.problems import Refusal, problem
from engine.models.facts import inspect_model
from engine.preflight.idle_gpus import CHECK
from engine.preflight.memory import size_text
from engine.runs import queue
from engine.spec.model_settings import Model

KINDS = {"transformers": "chat", "vllm": "vllm"}  # inference engines → the kind of a lease
BYTES_PER_WEIGHT = {"none": 2.0, "8bit": 1.0, "4bit": 0.5}  # at least, once it is loaded
CHECK_SECONDS, LOOK_SECONDS = 20.0, 0.2  # most checks of a package take less


def weight_bytes(base: str, loading: Mapping[str, Any]) -> float:
    """The bytes that the weights of a model take in memory, at least; 0 if they are unknown. `loading` is the `model`
    part of a spec."""
    model, kind = inspect_model(base), Model(**loading).quantization.kind
    return model.bytes if model.quantized else BYTES_PER_WEIGHT.get(kind, 0.5) * (model.parameters or 0)


def free_gpu(settings: Mapping[str, Any], saves: Path, without: Collection[str] = ()) -> Gpu | None:
    """The GPU for a server with these settings (serve.json), preferably one that nobody uses, then the one with the
    most free memory; None if the machine has none. `without`: the UUIDs of those that it cannot have.

    Raises Refusal with their users if every GPU is in use or kept, with the free memory if the weights alone do not fit
    into it, or if the driver cannot list them.
    """
    if failure := hardware.gpu_failure():
        raise Refusal(failure)
    if not hardware.gpus():
        return None
    if unusable := leases.obstacle():
        raise Refusal(unusable)
    left, users = _admitting(settings["engine"], saves, without)
    needed = weight_bytes(settings["base"], settings["model"])
    roomy = _roomy(left, needed)
    if not roomy:
        hardware.ask_driver_again()  # a server that shared a GPU with others may just have ended
        left = [gpu for gpu in hardware.gpus() if gpu.uuid not in users]
        roomy = _roomy(left, needed)
    if not roomy:
        free = "; ".join(f"GPU {gpu.index}: {size_text(gpu.free)}" for gpu in left)
        raise Refusal(problem("chat-no-room", name=settings["name"], needed=size_text(needed), free=free))
    return max(roomy, key=lambda gpu: (others_bytes(gpu) is None, gpu.free))


def _admitting(engine: str, saves: Path, without: Collection[str]) -> tuple[list[Gpu], dict[str, str]]:
    """The GPUs that a server with this engine can have, and the users of the others by UUID. Raises Refusal with them
    if there is none; before, it waits for one on which a package is being tried, since nobody has asked for that."""
    deadline = monotonic() + CHECK_SECONDS
    while True:
        holders, gpus = leases.holders(), hardware.gpus()
        users = {uuid: holder.text for uuid, holder in holders.items() if not _admits(holder, engine)}
        users = dict.fromkeys(without, "?") | queue.kept_gpus(saves) | users
        if left := [gpu for gpu in gpus if gpu.uuid not in users]:
            return left, users
        tried = {uuid for uuid, holder in holders.items() if holder.kind == CHECK}.difference(without)
        if tried.isdisjoint(gpu.uuid for gpu in gpus) or monotonic() > deadline:
            who = "; ".join(f"GPU {gpu.index}: {users[gpu.uuid]}" for gpu in sorted(gpus, key=lambda gpu: gpu.index))
            raise Refusal(problem("chat-card-taken", who=who))
        sleep(LOOK_SECONDS)


def _roomy(gpus: Sequence[Gpu], needed: float) -> list[Gpu]:
    """Those with so many bytes of free memory, or with an unknown amount."""
    return [gpu for gpu in gpus if not gpu.memory or gpu.free >= needed]


def lease(uuid: str, engine: str, holder: Holder) -> list[int] | None:
    """The descriptors that hold the lease; None if somebody has taken the GPU in the meantime."""
    descriptors = leases.take([uuid], holder)
    return leases.take_beside(uuid, holder) if descriptors is None and engine == "transformers" else descriptors


def _admits(holder: Holder, engine: str) -> bool:
    """Whether a server with this engine can share the GPU."""
    return engine == "transformers" and holder.kind == KINDS[engine]
