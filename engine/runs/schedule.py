"""Which of the waiting runs can start now, and on which GPUs. Pure: it starts nothing, and asks nobody.

The runs are considered in the order of the queue. One that cannot start reserves the GPUs that it could use as far as
they are free, so that a later run starts before it only on GPUs that it does not need (backfilling with reservations;
no run's duration is assumed to be known). What it waits for has to end by itself: while programs without a lease are in
its way, of which nobody knows when they end, it reserves nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.core.gpu_choice import eligible, emptiest, others_bytes
from engine.core.hardware import Gpu
from engine.core.problems import NOTHING, Problem, problem

MAX_NAMED = 3  # runs in a sentence


@dataclass(frozen=True)
class Demand:
    """What a run needs: the GPUs with these `indices`, or any `count` with `memory` bytes each (0 if unknown) and this
    compute `capability`. Without GPUs, `memory` is that of the machine. `fits`: there were enough GPUs with this memory
    when it was submitted, so no smaller ones are tried. `beside_others`: even on GPUs on which processes of others
    compute or that have too little memory, or on a CPU that other runs use."""

    name: str
    count: int = 1
    indices: tuple[int, ...] = ()
    memory: int = 0
    capability: float = 0.0
    fits: bool = False
    beside_others: bool = False
    held: bool = False
    allowed: frozenset[str] | None = None  # the UUIDs of the GPUs that it may use; None: all
    owner: str = ""  # whose limit of runs at once it counts towards

    @property
    def on_cpu(self) -> bool:
        return self.count == 0


@dataclass(frozen=True)
class Machine:
    """The devices as they are now. `taken`: who uses a GPU, by its UUID, among runs and servers; `lanes`: how many runs
    may use the CPU at once, `on_cpu` those that do, and `free_memory` the bytes that they leave for another.
    `running`: how many runs each owner has in progress, and `limits` how many at once they may have, if there is a
    limit. `used_up`: the owners who have no GPU hours left for which a run would be stopped again."""

    gpus: Sequence[Gpu]
    taken: Mapping[str, str]
    lanes: int = 1
    free_memory: int = 0
    on_cpu: Sequence[str] = ()
    running: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    used_up: Collection[str] = ()


@dataclass(frozen=True)
class Decision:
    """Whether a run starts now, on which GPUs; otherwise why not: a sentence, what keeps it from single GPUs, and which
    free ones are kept for it."""

    gpus: tuple[Gpu, ...] = ()
    kept: tuple[Gpu, ...] = ()
    reason: Problem | None = None
    details: tuple[Problem, ...] = ()

    @property
    def starts(self) -> bool:
        return self.reason is None

    def text(self, language: str = "en") -> str:
        """Why it waits, in one line."""
        if self.reason is None:
            return ""
        details = ("；" if language == "zh" else "; ").join(detail.text(language) for detail in self.details)
        return self.reason.text(language) + (f" {details}" if details else "")


def decide(demands: Sequence[Demand], machine: Machine) -> list[Decision]:
    """What happens to each of the waiting runs, in their order."""
    taken, reserved, on_cpu = dict(machine.taken), dict[str, str](), list[Demand]()
    running = Counter(machine.running)
    decisions = []
    for demand in demands:
        if reason := kept_back(demand.held, demand.owner, running, machine.limits, machine.used_up):
            decision = Decision(reason=reason)  # it keeps nothing for itself: what others wait for is free
        elif demand.on_cpu:
            decision = _on_cpu(demand, machine, on_cpu)
            on_cpu.append(demand)  # it starts, or its place is kept
        else:
            decision = _on_gpus(demand, machine.gpus, taken, reserved)
            taken |= {gpu.uuid: demand.name for gpu in decision.gpus}
            reserved |= {gpu.uuid: demand.name for gpu in decision.kept}
        running[demand.owner] += decision.starts
        decisions.append(decision)
    return decisions


def kept_back(
    held: bool, owner: str, running: Mapping[str, int], limits: Mapping[str, float], used_up: Collection[str] = ()
) -> Problem | None:
    """Why a run waits whatever devices there are: it is on hold, its owner has used up their GPU hours, or has as many
    runs in progress as are allowed at once. None if nothing of that is so."""
    if held:
        return problem("waits-held")
    if owner in used_up:
        return problem("waits-hours", user=owner)
    count, limit = running.get(owner, 0), limits.get(owner, math.inf)
    return problem("waits-quota", user=owner, running=count, limit=f"{limit:g}") if count >= limit else None


def _on_cpu(demand: Demand, machine: Machine, before: Sequence[Demand]) -> Decision:
    """The only run on the CPU may try to use all of the memory."""
    names = [*machine.on_cpu, *(other.name for other in before)]
    if len(names) >= machine.lanes and not demand.beside_others:
        listed = [*names[:MAX_NAMED], *["…"] * (len(names) > MAX_NAMED)]
        return Decision(reason=problem("waits-cpu", runs=", ".join(listed)))
    free = machine.free_memory - sum(other.memory for other in before)
    if names and demand.memory > free:
        return Decision(reason=problem("waits-memory", needed=_size(demand.memory), free=_size(max(free, 0))))
    return Decision()


def _on_gpus(demand: Demand, gpus: Sequence[Gpu], taken: Mapping[str, str], reserved: Mapping[str, str]) -> Decision:
    eligible = _eligible(demand, gpus)
    if len(eligible) < demand.count:
        return Decision(reason=_never(demand, eligible, gpus))
    obstacles = {gpu.uuid: _obstacle(gpu, demand, taken, reserved) for gpu in eligible}
    ready = [gpu for gpu in eligible if obstacles[gpu.uuid] is None]
    if len(ready) >= demand.count:
        order = demand.indices or [gpu.index for gpu in gpus]
        return Decision(tuple(sorted(emptiest(ready, demand.count), key=lambda gpu: order.index(gpu.index))))
    details = list(filter(None, obstacles.values()))
    expected = [gpu for gpu in eligible if gpu in ready or gpu.uuid in taken or gpu.uuid in reserved]
    kept = emptiest(ready, demand.count) if len(expected) >= demand.count else []
    if ready and not kept:
        details.append(problem("waits-keeps-none", free=len(ready)))
    return Decision(reason=_too_few_free(demand, len(ready)), details=tuple(details), kept=tuple(kept))


def _too_few_free(demand: Demand, free: int) -> Problem:
    """That a run waits until more GPUs are free."""
    values = {"count": demand.count, "free": free}
    if demand.indices:
        return problem("waits-these-gpus", gpus=", ".join(map(str, demand.indices)), **values)
    if demand.memory:
        return problem("waits-gpus-memory", needed=_size(demand.memory), **values)
    return problem("waits-gpus", **values)


def _never(demand: Demand, eligible: Sequence[Gpu], gpus: Sequence[Gpu]) -> Problem:
    """That there are not as many GPUs as the run needs, so that it cannot start until that changes."""
    if demand.indices:
        missing = sorted(set(demand.indices) - {gpu.index for gpu in eligible})
        return problem("waits-missing-gpus", gpus=", ".join(map(str, missing)), count=len(missing))
    values = {"count": demand.count, "there": len(eligible)}
    if len(_eligible(replace(demand, fits=False), gpus)) >= demand.count:
        return problem("waits-too-small-gpus", needed=_size(demand.memory), **values)
    return problem("waits-too-few-gpus", **values)


def _eligible(demand: Demand, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that could ever be used."""
    return eligible(
        gpus,
        demand.count,
        indices=demand.indices,
        memory=demand.memory,
        capability=demand.capability,
        allowed=demand.allowed,
        must_fit=demand.fits and not demand.beside_others,
    )


def _obstacle(gpu: Gpu, demand: Demand, taken: Mapping[str, str], reserved: Mapping[str, str]) -> Problem | None:
    """Why the run cannot use this GPU now."""
    if gpu.uuid in taken:
        return problem("waits-taken", gpu=gpu.index, who=taken[gpu.uuid])
    if gpu.uuid in reserved:
        return problem("waits-reserved", gpu=gpu.index, run=reserved[gpu.uuid])
    return None if demand.beside_others else _foreign_use(gpu, demand.memory)


def _foreign_use(gpu: Gpu, memory: int) -> Problem | None:
    """What programs without a lease use of a GPU, so that a run that needs so many bytes of it cannot start."""
    if (others := others_bytes(gpu)) is not None:
        pids = ", ".join(str(process.pid) for process in gpu.processes) or NOTHING
        return problem("waits-others", gpu=gpu.index, size=_size(others), pids=pids)
    if gpu.free < memory <= gpu.memory:
        return problem("waits-free-memory", gpu=gpu.index, free=_size(gpu.free), whole=_size(gpu.memory))
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
