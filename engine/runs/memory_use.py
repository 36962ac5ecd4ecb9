"""Memory that runs are going to take, and those that somebody starts where too little is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.core.hardware import Gpu
from engine.core.problems import problem
from engine.core.run_warnings import write_warning
from engine.launch.processes import memory_in_use
from engine.preflight.memory import size_text
from engine.runs.attempts import resumed_from
from engine.runs.run import Run
from engine.runs.schedule import Demand


def still_to_take(needs: Iterable[tuple[Path, int]]) -> int:
    """The bytes of main memory that runs in progress are going to need and have not taken yet: one that still imports
    has next to nothing. `needs`: their folders, and the bytes that each needs."""
    return sum(max(memory - memory_in_use(folder), 0) for folder, memory in needs)


def warn_if_short(run: Run, needed: Demand, gpus: Sequence[Gpu]) -> None:
    """Warn in a run that has started on these GPUs although less memory was free there than it needs, as it was told
    to."""
    short = [gpu for gpu in gpus if gpu.memory and gpu.free < needed.memory]
    if needed.beside_others and short:
        free = ", ".join(f"GPU {gpu.index}: {size_text(gpu.free)}" for gpu in short)
        warning = problem("starts-short-of-memory", needed=size_text(needed.memory), free=free)
        write_warning(run.dir, warning, resumed_from(run) or 0)
