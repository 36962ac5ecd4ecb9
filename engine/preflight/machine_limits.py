"""Check numbers of processes against memory and cores of the machines that compute: this one, or those of a cluster, as
far as its operator has described them."""

from __future__ import annotations

from collections.abc import Iterator

from engine.core import hardware
from engine.core.problems import Problem, problem
from engine.launch.command import on_cpu
from engine.models.facts import ModelFacts
from engine.preflight import memory
from engine.preflight.strategy import main_memory_needed
from engine.spec.run_spec import RunSpec

WORKER_BYTES = 100 << 20  # bytes that each preparing process needs: its part of the tokenizer, and the rows of a block


def process_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Processes on a CPU share its memory: each has its own copy of the model, whatever its rows are."""
    gpu_count, whole, chosen = len(hardware.planned_gpus()), hardware.planned_memory(), spec.hardware
    several = on_cpu(spec, gpu_count) and chosen.processes_per_machine > 1
    need = memory.memory_needed(spec, model, gpu_count) if several else None
    if need is None or whole is None:
        return []
    process_bytes = need.weights + need.learning + memory.CPU_LIBRARY_BYTES
    largest = max(int(whole / process_bytes), 1)
    if chosen.processes_per_machine <= largest:
        return []
    values = {
        "given": chosen.num_processes,
        "machines": chosen.machines if chosen.machines > 1 else "—",
        "each": memory.size_text(process_bytes),
        "whole": memory.size_text(whole),
        "largest": largest * chosen.machines,
    }
    return [problem("processes-beyond-memory", "hardware.num_processes", **values)]


def worker_problems(spec: RunSpec) -> list[Problem]:
    """Processes that prepare rows share the memory of the first machine."""
    workers, whole = spec.data.preprocessing_num_workers or 0, hardware.planned_memory()
    if whole is None or workers * WORKER_BYTES <= whole:
        return []
    fitting = whole // WORKER_BYTES
    values = {
        "given": workers,
        "whole": memory.size_text(whole),
        "largest": max(min(fitting, hardware.planned_cores() or fitting), 1),
    }
    return [problem("workers-beyond-memory", "data.preprocessing_num_workers", **values)]


def core_warnings(spec: RunSpec) -> list[Problem]:
    """More processes on a machine than it has cores."""
    cores = hardware.planned_cores()
    counts = _process_counts(spec) if cores else ()
    return [problem(code, path, given=count, cores=cores) for code, path, count in counts if cores and count > cores]


def _process_counts(spec: RunSpec) -> Iterator[tuple[str, str, int]]:
    """Numbers of processes that a machine should have cores for: code of the warning, setting, number."""
    yield "more-workers-than-cores", "data.preprocessing_num_workers", spec.data.preprocessing_num_workers or 0
    loading = spec.extra.get("dataloader_num_workers")
    if isinstance(loading, int):
        yield "more-workers-than-cores", "extra.dataloader_num_workers", loading
    if on_cpu(spec, len(hardware.planned_gpus())):
        yield "more-processes-than-cores", "hardware.num_processes", spec.hardware.processes_per_machine


def unknown_nodes(spec: RunSpec, model: ModelFacts | None) -> list[Problem]:
    """What of this run was not checked because nobody has described the machines of the cluster. Of their GPUs, the
    page shows whether there is an estimate."""
    lines = []
    in_memory = on_cpu(spec, len(hardware.planned_gpus())) or (model and main_memory_needed(spec, model))
    if hardware.planned_memory() is None and in_memory:
        lines.append("memory_gb")
    if hardware.planned_cores() is None and any(count > 1 for _, _, count in _process_counts(spec)):
        lines.append("cores")
    return [problem("nodes-unknown", "hardware.device", lines=", ".join(lines))] if lines else []
