"""Which run starts next. A durable queue: it consists of the run folders that have not started.

The order is that of submission, unless somebody changes it; `engine.runs.schedule` decides who starts, and on which
GPUs. Everything that may have to start a run (a studio's tick, a supervisor that ends, a shell command) calls
`advance`. The queue's own lock lets only one caller do so at a time, so two studios on one saves folder never start a
run twice; the leases of the GPUs (`engine.core.leases`) keep runs of other saves folders apart.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.core import hardware, leases, regular_files
from engine.core.hardware import Gpu
from engine.core.locks import holding, is_locked
from engine.core.problems import Problem, Refusal
from engine.core.rundir import SUPERVISED_BYTE, RunDir, read_object, write_json
from engine.launch import command
from engine.launch.engine_choice import is_local
from engine.launch.workspace import PROJECT
from engine.preflight.suitable_gpus import enough_fit, likely_gpus, needed_capability
from engine.runs import index, memory_use
from engine.runs.quotas import read_quotas
from engine.runs.run import Run, read
from engine.runs.schedule import Decision, Demand, Machine, decide
from engine.spec.run_spec import Spec

MAX_ROUNDS = 100  # of looking at the queue again after a start that failed
GPUS_TAKEN = 75  # exit code of a supervisor whose GPUs have been leased by another in the meantime


def saves_of(folder: Path) -> Path:
    """The saves folder that contains a run."""
    return folder.parents[2]


@contextlib.contextmanager
def locked(saves: Path) -> Iterator[int]:
    """Lock the queue: nobody else starts, resumes or deletes a run meanwhile, nor while a child has the descriptor of
    the lock."""
    with holding(saves / ".queue.lock") as lock:
        yield lock


def waiting(saves: Path) -> list[Run]:
    """Runs that have not started, in the order in which they are considered."""
    return waiting_among(index.open_runs(saves))


def waiting_among(open_runs: Iterable[Run]) -> list[Run]:
    """The same of open runs that have been read already."""
    queued = [
        run for run in open_runs if run.state == "queued" and not (run.request.get("damaged") or run.dir.on_slurm())
    ]
    return sorted((run for run in queued if _turn(run)), key=_turn)


def _turn(run: Run) -> tuple[float, ...]:
    """What the queue is sorted by: the lower, the sooner. Empty if the request is damaged."""
    values = run.request.get("queued", 0), run.request.get("priority", 0)
    if not all(isinstance(value, (int, float)) for value in values):
        return ()
    since, priority = values
    return (not run.request.get("now"), -priority, since)


def is_occupied(saves: Path) -> bool:
    """Whether a run is alive."""
    return _any_alive(index.open_runs(saves))


def is_busy(saves: Path) -> bool:
    """Whether a run is alive or waiting to start."""
    open_runs = index.open_runs(saves)
    return bool(waiting_among(open_runs)) or _any_alive(open_runs)  # in this order: one that waits may start meanwhile


def _any_alive(open_runs: Iterable[Run]) -> bool:
    return any(run.dir.alive() for run in open_runs)


@dataclass(frozen=True)
class Place:
    """The place of a waiting run in the queue: 1 for the first, None if that is unknown. `decision`: why it waits."""

    number: int | None
    decision: Decision


def place(run: Run) -> Place | None:
    """None if the run is not waiting."""
    if run.state != "queued":
        return None
    for number, (other, decision) in enumerate(decisions(saves_of(run.path)), start=1):
        if other.path == run.path:
            return Place(number, decision)
    return None  # it has started in the meantime


def decisions(saves: Path) -> list[tuple[Run, Decision]]:
    """The waiting runs in their order, and why each waits."""
    open_runs = index.open_runs(saves)
    queued = waiting_among(open_runs)
    return list(zip(queued, _decide(queued, open_runs), strict=True))


def kept_gpus(saves: Path) -> dict[str, str]:
    """The free GPUs that are kept for waiting runs, or on which they are about to start, by UUID, and for which. None
    if runs compute elsewhere."""
    if not is_local(saves):
        return {}
    return {gpu.uuid: run.title for run, decision in decisions(saves) for gpu in (*decision.gpus, *decision.kept)}


# ------------------------------------------------------------------------------------------ who starts, and where


def demand_fields(spec: Spec, memory: int, capability: float = 0.0) -> dict[str, Any]:
    """What request.json says of a run's devices: decided at submission, by the process that knows which GPUs the run
    may use. Whoever starts the run may have another CUDA_VISIBLE_DEVICES."""
    gpus, chosen = hardware.planned_gpus(), spec.hardware
    limited = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    return {
        "count": 0 if command.on_cpu(spec, len(gpus)) else chosen.num_processes,
        "indices": list(chosen.devices),
        "allowed": [gpu.uuid for gpu in gpus] if limited else None,
        "memory": memory,
        "capability": capability,
        "fits": enough_fit(spec, memory),
    }


def is_for_cpu(run: RunDir, spec: Spec) -> bool:
    """Whether a run was submitted for the CPU."""
    return (_valid(read_object(run.request).get("devices")) or demand_fields(spec, 0))["count"] == 0


def counted_gpus(fields: Any) -> int | None:
    """The number of GPUs in what `demand_fields` has written, 0 for the CPU; None if it is damaged, or missing."""
    valid = _valid(fields)
    return int(valid["count"]) if valid else None


def demand(run: Run) -> Demand:
    """What a waiting run needs."""
    request = run.request
    fields = _valid(request.get("devices")) or _demand_of_older(run)
    on_cpu, allowed = fields["count"] == 0, fields.get("allowed")
    return Demand(
        run.title,
        count=fields["count"],
        indices=() if on_cpu else tuple(fields["indices"]),
        memory=fields["memory"],
        capability=fields.get("capability", 0.0),  # absent from requests of older versions, as is the next
        fits=bool(fields.get("fits")),
        beside_others=bool(request.get("now")),
        held=bool(request.get("held")),
        allowed=None if allowed is None else frozenset(allowed),
        owner=run.by,
    )


def _valid(fields: Any) -> dict[str, Any] | None:
    """What `demand_fields` has written; None if it is damaged, or missing."""
    if not isinstance(fields, dict) or not isinstance(fields.get("indices"), list):
        return None
    numbers = all(isinstance(fields.get(name), int) for name in ("count", "memory"))
    numbers &= isinstance(fields.get("capability", 0), (int, float))
    return fields if numbers and isinstance(fields.get("allowed"), (list, type(None))) else None


def _demand_of_older(run: Run) -> dict[str, Any]:
    """Of a run that was submitted by a version without leases. One whose spec cannot be read needs nothing: it starts,
    and fails with the reason."""
    try:
        return demand_fields(run.spec, 0)
    except Refusal:
        return {"count": 0, "indices": [], "memory": 0}


def _decide(queued: Sequence[Run], open_runs: Sequence[Run]) -> list[Decision]:
    """What happens to the waiting runs now. While the driver fails, or no lease can be taken, those that need a GPU
    wait."""
    if not queued:
        return []
    demands = [demand(run) for run in queued]
    saves, owners = saves_of(queued[0].path), {needed.owner for needed in demands}
    limits, wrong = limits_at_once(saves, owners)
    alive = [run for run in open_runs if run.dir.alive()]
    on_cpu = [(run.path, need.memory) for run in alive if (need := demand(run)).on_cpu and not run.dir.on_slurm()]
    to_come = memory_use.still_to_take(on_cpu) if any(needed.on_cpu for needed in demands) else 0
    machine = _machine(alive)
    machine = replace(
        machine,
        free_memory=machine.free_memory - to_come,
        running=Counter(run.by for run in alive),
        limits=limits,
        used_up=without_hours(saves, owners),
    )
    decisions = decide(demands, machine)
    if wrong:  # nobody knows how many may start
        unknown = Decision(reason=wrong)
        decisions = [
            unknown if needed.owner and decision.starts else decision
            for needed, decision in zip(demands, decisions, strict=True)
        ]
    failure = None
    if any(not (needed.on_cpu or needed.held) for needed in demands):
        failure = hardware.driver_failure() or leases.obstacle()
    return [
        decision if failure is None or needed.on_cpu or needed.held else Decision(reason=failure)
        for needed, decision in zip(demands, decisions, strict=True)
    ]


def limits_at_once(saves: Path, owners: Iterable[str]) -> tuple[dict[str, float], Problem | None]:
    """How many runs at once those of `owners` who have a limit may have, and what is wrong with the file of quotas."""
    try:
        quotas = read_quotas(saves)
    except Refusal as refusal:
        return {}, refusal.problems[0]
    limits = {owner: quotas.of(owner).runs_at_once for owner in owners}
    return {owner: limit for owner, limit in limits.items() if limit is not None}, None


def without_hours(saves: Path, owners: Iterable[str]) -> set[str]:
    """Those of `owners` whose GPU hours are used up, if the operator has runs stopped then: one that starts
    would be stopped at once."""
    try:
        quotas = read_quotas(saves)
    except Refusal:
        return set()
    limited = {owner: limit for owner in owners if (limit := quotas.of(owner).gpu_hours) is not None}
    if not quotas.stops or not limited:
        return set()
    from engine.runs.quota_use import hours_of  # most supervisors never need what it imports

    return {owner for owner, limit in limited.items() if hours_of(saves, owner) >= limit}


def _machine(alive: Sequence[Run]) -> Machine:
    """The devices as they are now, and which runs use them; not those that Slurm has on other machines."""
    holders, gpus = leases.holders(), hardware.all_gpus()
    taken = {uuid: holder.text for uuid, holder in holders.items()}
    on_cpu = []
    for run in alive:
        if run.dir.on_slurm():
            continue
        if demand(run).on_cpu:
            on_cpu.append(run)
            continue
        # A run that was started before there were leases holds none.
        names = str(read_object(run.dir.keeper).get("devices", "")).split(",")
        taken |= {gpu.uuid: run.title for gpu in gpus if gpu.cuda_name in names and gpu.uuid not in taken}
    return Machine(
        gpus,
        taken,
        lanes=hardware.cpu_runs(),
        on_cpu=[run.title for run in on_cpu],
        free_memory=hardware.memory()[0],
    )


def gpus_for(spec: Spec, memory: int) -> tuple[Gpu, ...]:
    """The GPUs that a run of `spec` would have if it were started now; if it would have to wait, those that it would
    probably have. `memory`: the estimated bytes of each of its processes."""
    holders, gpus = leases.holders(), hardware.planned_gpus()
    if command.on_cpu(spec, len(gpus)):
        return ()
    chosen = spec.hardware
    needed = Demand(
        "",
        count=chosen.processes_per_machine,
        indices=tuple(chosen.devices),
        memory=memory,
        capability=needed_capability(spec),
    )
    [decision] = decide([needed], Machine(gpus, dict.fromkeys(holders, "")))
    return decision.gpus or tuple(likely_gpus(spec, memory))


def uuids_for(run: RunDir) -> list[str] | None:
    """The GPUs of a run whose supervisor was told none, because the run needs none; or by a studio of a version without
    leases, whose code has been replaced under it. None if there are not enough now."""
    needed = replace(demand(read(run.path, saves_of(run.path))), held=False)
    if needed.on_cpu:
        return []
    [decision] = decide([needed], _machine([]))
    return [gpu.uuid for gpu in decision.gpus] if decision.starts else None


HandOver = Callable[[RunDir, int, Sequence[Gpu]], bool]


def not_handed_over(_run: RunDir, _lock: int, _gpus: Sequence[Gpu]) -> bool:
    """There is no supervisor yet."""
    return False


def advance(saves: Path, hand_over: HandOver = not_handed_over) -> None:
    """Start every waiting run that can start. `hand_over` may give it to a supervisor that exists already: (run,
    descriptor of the queue's lock, GPUs) → whether the run has a supervisor."""
    failed: list[tuple[Run, tuple[Gpu, ...]]] = []
    with locked(saves) as lock:
        for _ in range(MAX_ROUNDS):
            open_runs = index.open_runs(saves)
            queued = waiting_among(open_runs)
            decisions = _decide(queued, open_runs)
            _note_waiting(queued, decisions)
            starts = [(run, decision.gpus) for run, decision in zip(queued, decisions, strict=True) if decision.starts]
            results = [hand_over(run.dir, lock, gpus) or _start(run.dir, lock, gpus) for run, gpus in starts]
            for (run, gpus), started in zip(starts, results, strict=True):
                if started:
                    memory_use.warn_if_short(run, demand(run), gpus)
            # If a run cannot get a supervisor it is put aside, and if another has taken its GPUs in the meantime it
            # waits on: either way, the others are looked at again, unless that would only do the same again.
            if all(results) or starts == failed:
                return
            failed = starts


def _note_waiting(queued: Sequence[Run], decisions: Sequence[Decision]) -> None:
    """Let idle chat servers know that a run waits for their GPUs."""
    needs = [
        needed
        for needed, decision in zip(map(demand, queued), decisions, strict=True)
        if not (decision.starts or needed.on_cpu or needed.held)
    ]
    holders = leases.holders() if needs else {}
    for gpu in hardware.all_gpus() if holders else ():
        holder = holders.get(gpu.uuid)
        if holder and holder.is_server and any(not needed.indices or gpu.index in needed.indices for needed in needs):
            leases.note_waiting(gpu.uuid)


def supervisor_command(folder: Path | str) -> list[str]:
    """The command that starts the supervisor of a run, and returns once it holds the run's lock. The UUIDs of its GPUs
    follow."""
    return [sys.executable, "-m", "engine.runs.supervisor", "keep", str(folder)]


def supervisor_environment() -> dict[str, str]:
    """The environment of a supervisor."""
    return command.inherited_environment() | {"PYTHONPATH": command.python_path(), "PYTHONUTF8": "1"}


def _start(run: RunDir, lock: int, gpus: Sequence[Gpu]) -> bool:
    """Whether the run has a supervisor from now on.

    The supervisor's standard input is the lock of the queue, until it holds the run's: if this process is killed in
    between, nobody considers the run as still waiting.
    """
    done = subprocess.run(
        [*supervisor_command(run.path), *(gpu.uuid for gpu in gpus)],
        cwd=PROJECT,
        env=supervisor_environment(),
        stdin=lock,
        capture_output=True,
        check=False,
    )
    # If it was killed after the supervisor had forked, the supervisor was started all the same.
    if done.returncode == 0 or is_locked(run.lock, SUPERVISED_BYTE):
        return True
    if done.returncode == GPUS_TAKEN:
        return False
    with contextlib.suppress(OSError), regular_files.append_to_regular(run.log) as log:
        log.write(done.stderr)
    give_up(run, done.returncode)
    return False


def give_up(run: RunDir, code: int, reason: str = "no-keeper") -> None:
    """Put a run aside that could not be supervised, so that it does not block the queue forever."""
    write_json(
        run.exit,
        {
            "outcome": "failed",
            "reason": reason,
            "code": code,
            "signal": None,
            "ended": time.time(),
            "attempt": run.attempt(),
            "peak_memory": 0,
        },
    )
