"""Resume a training on other devices, or with another number of processes: what stays the same, and what forbids it.

Each step keeps its examples, in the same order: the batches of a process stay as large as they are, and each process
computes more or fewer of them per step. Weights and optimizer state are whole in every checkpoint, except those of
DeepSpeed, which has a part for each process. Random states belong to processes, so dropout goes on differently.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from engine.core import hardware
from engine.core.gpu_choice import BF16_CAPABILITY
from engine.core.hardware import Gpu
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir, step_of, write_text
from engine.launch.accelerate_config import is_deepspeed, is_fsdp, with_processes
from engine.launch.command import on_cpu
from engine.launch.engine_choice import is_local
from engine.preflight.checks import device_problems, engine_problems
from engine.runs import attempts, kinds, queue, sweep_standing
from engine.runs.run import Run, sweep_of
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.steps import examples_per_step

# Stages in which the loss of a step is a mean over its examples, whichever of them a process has at a time.
STAGES_OF_MEANS = ("pt", "sft", "rm", "dpo", "orpo", "simpo")
MAX_LISTED = 12  # numbers of processes or machines in a sentence or a list
MAX_MACHINES = 256  # that are looked at


@dataclass(frozen=True)
class _Folder:
    """What the folder of a run says about other numbers of processes, read once."""

    begun: bool  # it has checkpoints
    divided: bool  # by FSDP2, among the processes
    zero: bool  # by DeepSpeed

    @classmethod
    def of(cls, run: Run) -> _Folder:
        begun, file = bool(run.dir.checkpoints()), run.dir.accelerate
        if not begun or not file.exists():
            return cls(begun, False, False)
        launched = file.read_text(encoding="utf-8")
        return cls(begun, is_fsdp(launched), is_deepspeed(launched))


def moved(run: Run, processes: int | None, devices: Sequence[int], machines: int | None = None) -> RunSpec:
    """The spec with which a run continues with so many processes (None: one for each of `devices`, otherwise as many as
    it has) on the GPUs with these indices (none: any), on so many machines (None: as many as it has). Raises Refusal
    with the reasons if that is not possible."""
    if run.kind != "training":
        raise Refusal(problem("resume-not-a-training", "hardware.num_processes"))
    spec: RunSpec = run.spec
    now = spec.hardware
    if devices and now.device == "cpu":
        raise Refusal(problem("resume-on-cpu", "hardware.devices"))
    chosen = {"num_processes": processes or len(devices) or now.num_processes, "devices": list(devices)}
    chosen |= {"num_machines": machines or now.num_machines}
    changed = spec.change("hardware", now.model_dump() | chosen)
    count = changed.hardware.num_processes
    if count != now.num_processes and (
        obstacles := _obstacles(_Folder.of(run), spec, count, changed.hardware.num_machines)
    ):
        raise Refusal(obstacles)
    accumulated = spec.training.gradient_accumulation_steps * now.num_processes
    changed = changed.change("training.gradient_accumulation_steps", accumulated // count)
    if now.strategy.kind in ("single", "ddp"):
        changed = changed.change("hardware.strategy", "single" if count == 1 else "ddp")
    elsewhere = engine_problems(changed.hardware, queue.saves_of(run.path))
    if wrong := spec_problems(changed) or elsewhere or device_problems(changed):
        raise Refusal(wrong)
    return changed


def possible_processes(run: Run, machines: int | None = None) -> list[int]:
    """The numbers of processes with which the run could continue on so many machines (None: as many as it has), if
    there are devices for them."""
    return list(islice(_possible(_Folder.of(run), run.spec, machines or run.spec.hardware.num_machines), MAX_LISTED))


def possible_machines(run: Run) -> list[int]:
    """The numbers of machines on which the run could continue, if there are so many."""
    spec: RunSpec = run.spec
    if is_local(queue.saves_of(run.path)):
        return [spec.hardware.num_machines]
    most = spec.training.gradient_accumulation_steps * spec.hardware.num_processes
    folder, counts = _Folder.of(run), range(1, min(most, MAX_MACHINES) + 1)
    return list(islice((count for count in counts if any(_possible(folder, spec, count))), MAX_LISTED))


def _possible(folder: _Folder, spec: RunSpec, machines: int) -> Iterator[int]:
    """The numbers of processes with which the run could continue on so many machines, in ascending order."""
    now = spec.hardware.num_processes
    counts = _counts(spec, machines)
    return (count for count in counts if count == now or not _obstacles(folder, spec, count, machines))


def selectable_gpus(run: Run) -> tuple[Gpu, ...]:
    """The GPUs from which those of the run can be chosen; none if Slurm chooses them, or if it computes on the CPU."""
    here = () if hardware.plans_elsewhere() else hardware.gpus()
    return () if on_cpu(run.spec, len(here)) else here


def _obstacles(folder: _Folder, spec: RunSpec, count: int, machines: int) -> list[Problem]:
    """What forbids another number of processes."""
    before, path = spec.hardware.num_processes, "hardware.num_processes"
    accumulated = spec.training.gradient_accumulation_steps * before
    if count not in _counts(spec, machines):
        counts = ", ".join(map(str, _counts(spec, machines)[:MAX_LISTED]))
        values = {"batch": spec.training.per_device_train_batch_size, "batches": accumulated, "possible": counts}
        values |= {"machines": machines if machines > 1 else "—"}
        return [problem("resume-uneven", path, count=count, **values)]
    if not folder.begun:
        return []  # it starts from the beginning
    if spec.stage.kind not in STAGES_OF_MEANS:
        return [problem("resume-stage-needs-processes", path, stage=spec.stage.kind, before=before)]
    if spec.extra.get("dataloader_drop_last"):
        return [problem("resume-drops-last", path, before=before)]
    if folder.zero:
        return [problem("resume-deepspeed", path, before=before)]
    if count == 1 and folder.divided:
        return [problem("resume-divided", path)]
    return []


def _counts(spec: RunSpec, machines: int) -> list[int]:
    """The numbers of processes among which the batches of a step, and which among the machines, can be divided."""
    batches = spec.training.gradient_accumulation_steps * spec.hardware.num_processes
    return [count for count in range(machines, min(batches, 1024) + 1, machines) if batches % count == 0]


def request_fields(run: Run, spec: Spec) -> Mapping[str, Any]:
    """What request.json says of a run that continues with `spec`, its own or another. Its devices are those that there
    are now: since it was submitted, the studio may have been given others. `processes`: those for which the order of
    its rows was made, which stays; recorded from the first time on that it continues with others. `beyond_budget`: that
    of its sweep is used up."""
    kind = kinds.KINDS[spec.kind]
    fields: dict[str, Any] = {"devices": queue.demand_fields(spec, kind.memory(spec), kind.capability(spec))}
    saves = queue.saves_of(run.path)
    if sweep := sweep_standing.sweep_with(run, saves):
        fields["beyond_budget"] = sweep_standing.budget(saves, sweep, time.time()).is_used_up
    count = spec.hardware.num_processes
    before = run.request.get("processes", run.spec.hardware.num_processes)
    if "processes" in run.request or count != before:
        fields["processes"] = before if run.dir.checkpoints() else count
    return fields


def with_precision(run: Run, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a run that continues. If its spec leaves the precision to the GPUs, they must have the one that it
    was begun in."""
    devices, spec = request.get("devices"), run.spec
    automatic = isinstance(spec, RunSpec) and spec.training.precision == "auto"
    if not isinstance(devices, dict) or not automatic or attempts.decided_precision(run.dir) != "bf16":
        return dict(request)
    return {**request, "devices": devices | {"capability": BF16_CAPABILITY}}


def notices(run: Run, request: Mapping[str, Any]) -> list[Problem]:
    """What the page of a run that continues with this request is to say."""
    notices = _change_of_device(run, request)
    if request.get("beyond_budget"):
        notices.append(problem("sweep-beyond", hours=f"{sweep_of(run)['budget_hours']:g}"))
    return notices


def _change_of_device(run: Run, request: Mapping[str, Any]) -> list[Problem]:
    """That it continues on GPUs and was on the CPU before, or the other way round."""
    before, now = (queue.counted_gpus(fields.get("devices")) for fields in (run.request, request))
    if before is None or now is None or bool(before) == bool(now):
        return []
    return [problem("resumed-on-gpus" if now else "resumed-on-cpu", "hardware.device")]


def change_spec(run: RunDir, before: RunSpec, spec: RunSpec) -> Problem | None:
    """Let the folder of a run have this spec, its own or another, for its next attempt. Returns what its page is to say
    about it. It may be killed at any place: the next time, accelerate.yaml follows the spec again."""
    past = run.attempts / str(run.attempt() - 1)
    if spec != before:
        for file in (run.spec, run.accelerate):
            if file.exists():
                write_text(past / file.name, file.read_text(encoding="utf-8"))
        write_text(run.spec, spec.to_yaml())
    count, checkpoints = spec.hardware.num_processes, run.checkpoints()
    if run.accelerate.exists():
        # From the first checkpoint on it stays, with the strategy on which that depends.
        if count > 1 and checkpoints:
            text = run.accelerate.read_text(encoding="utf-8")
            write_text(run.accelerate, with_processes(text, count, spec.hardware.num_machines))
        else:
            run.accelerate.unlink()
    if count == before.hardware.num_processes or not checkpoints:
        return None
    values = {
        "step": step_of(checkpoints[-1]),
        "count": count,
        "before": before.hardware.num_processes,
        "batches": spec.training.gradient_accumulation_steps,
        "examples": examples_per_step(spec),
    }
    return problem("resumed-with-others", "hardware.num_processes", **values)
