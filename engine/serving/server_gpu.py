"""The GPU of a server: which one it gets, and its lease.

Servers with transformers share a GPU with each other, but not with a run. vLLM takes up nearly all the memory of its
GPU and has it alone.
"""

from __future__ import annotations

from engine.core import hardware, leases
from engine.core.gpu_choice import others_bytes
from engine.core.hardware import Gpu
from engine.core.leases import Holder
from engine.core.problems import Problem, Refusal, problem

KINDS = {"transformers": "chat", "vllm": "vllm"}  # inference engines → the kind of a lease


def free_gpu(engine: str) -> Gpu | None:
    """The GPU for a server with this engine, preferably one that nobody uses, then the one with the most free memory;
    None if the machine has none.

    Raises Refusal with their users if every GPU is leased, or if the driver cannot list them.
    """
    if failure := hardware.gpu_failure():
        raise Refusal(failure)
    gpus, holders = hardware.gpus(), leases.holders()
    if gpus and (unusable := leases.obstacle()):
        raise Refusal(unusable)
    left = [gpu for gpu in gpus if gpu.uuid not in holders or _shared(holders[gpu.uuid], engine)]
    if gpus and not left:
        raise Refusal(_taken({gpu.index: holders[gpu.uuid] for gpu in gpus}))
    return max(left, key=lambda gpu: (others_bytes(gpu) is None, gpu.free)) if left else None


def lease(uuid: str, engine: str, holder: Holder) -> list[int]:
    """The descriptors that hold the lease. Raises Refusal if somebody has taken the GPU in the meantime."""
    descriptors = leases.take([uuid], holder)
    if descriptors is None and engine == "transformers":
        descriptors = leases.take_beside(uuid, holder)
    if descriptors is None:
        index = next((gpu.index for gpu in hardware.gpus() if gpu.uuid == uuid), 0)
        raise Refusal(_taken({index: leases.holders().get(uuid, Holder("?", ""))}))
    return descriptors


def _shared(holder: Holder, engine: str) -> bool:
    return engine == "transformers" and holder.kind == KINDS[engine]


def _taken(holders: dict[int, Holder]) -> Problem:
    who = "; ".join(f"GPU {index}: {holder.text}" for index, holder in sorted(holders.items()))
    return problem("chat-card-taken", who=who)
