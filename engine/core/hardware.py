"""What this machine has: cards, cores, memory, disk. No process but a worker opens a CUDA context."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.core.problems import Problem, problem

CGROUP = Path("/sys/fs/cgroup")  # of the kernel's second kind, as a container sees its own
# One of these is there wherever a driver is installed, or was handed into a container or WSL.
DRIVER_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
QUERY_LIMIT_SECONDS = 10.0  # for the driver to answer
QUERY_HOLDS_SECONDS, FAILURE_HOLDS_SECONDS = 5.0, 60.0


@dataclass(frozen=True)
class Gpu:
    """One card. Memory in bytes. `index` is nvidia-smi's; memory is 0 where the driver does not tell it."""

    index: int
    uuid: str
    name: str
    memory: int
    free: int
    capability: float


def gpus() -> tuple[Gpu, ...]:
    """The cards that may be used here, as of a few seconds ago: those of CUDA_VISIBLE_DEVICES, where somebody has set it,
    in its order; else all. None where there are none, and where the driver fails (see `gpu_failure`)."""
    return _visible(_cached_query()[0], os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_failure() -> Problem | None:
    """Why the cards of this machine cannot be asked for; None where they can, and where there are none."""
    return _cached_query()[1] if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else None


def chosen_gpus(indices: Sequence[int], count: int) -> tuple[Gpu, ...]:
    """The cards with these indices, as far as they are there; where none is named, the first `count`."""
    there = gpus()
    if not indices:
        return there[:count]
    by_index = {gpu.index: gpu for gpu in there}
    return tuple(by_index[index] for index in indices if index in by_index)


def _visible(all_gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """As CUDA reads its variable: indices or the beginnings of UUIDs, up to the first that is no card."""
    if visible is None:
        return all_gpus
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        name = entry.strip()
        fits = [
            gpu
            for gpu in all_gpus
            if name == str(gpu.index) or (name[:4] == "GPU-" and gpu.uuid.startswith(name))
        ]
        if len(fits) != 1 or fits[0] in chosen:
            break
        chosen += fits
    return tuple(chosen)


_turn = threading.Lock()
_last_query: tuple[float, tuple[tuple[Gpu, ...], Problem | None]] | None = (
    None  # until when it holds, and the answer
)


def _cached_query() -> tuple[tuple[Gpu, ...], Problem | None]:
    global _last_query
    with _turn:
        if _last_query is None or time.monotonic() > _last_query[0]:
            answer = _query_gpus()
            holds = FAILURE_HOLDS_SECONDS if answer[1] else QUERY_HOLDS_SECONDS
            _last_query = (time.monotonic() + holds, answer)
        return _last_query[1]


def _query_gpus() -> tuple[tuple[Gpu, ...], Problem | None]:
    """The cards of this machine, or why they cannot be asked. A machine without a trace of a driver has none."""
    if not any(os.path.exists(trace) for trace in DRIVER_TRACES):
        return (), None
    program = Path(__file__).with_name("gpu_query.py")
    try:
        done = subprocess.run(
            [sys.executable, program], capture_output=True, text=True, timeout=QUERY_LIMIT_SECONDS
        )
        answer = json.loads(done.stdout or "null") or {
            "error": done.stderr.strip().rpartition("\n")[2] or "—"
        }
    except subprocess.TimeoutExpired:
        return (), problem("gpu-driver-silent", "hardware.device", seconds=int(QUERY_LIMIT_SECONDS))
    except (OSError, ValueError) as error:
        answer = {"error": str(error)}
    if "error" in answer:
        return (), problem("gpu-driver-failed", "hardware.device", what=answer["error"])
    return tuple(Gpu(**gpu) for gpu in answer["gpus"]), None


def threads() -> int:
    """CPU threads for a run: OMP_NUM_THREADS where somebody has set it, else the cores this process may use."""
    match = re.match(
        r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", "")
    )  # 4,2 is 4 outside and 2 inside
    return int(match[1]) if match else len(os.sched_getaffinity(0))


def memory() -> tuple[int, int]:
    """Main memory in bytes that this process may have: what is free now, and all of it. In a container that of the
    container, where that is less."""
    now = psutil.virtual_memory()
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such group, or "max": no limit
        return now.available, now.total
    # Files that were read count as used, and are given back when anybody needs the memory.
    free = most - used + (int(kept[1]) if kept else 0)
    return min(now.available, max(free, 0)), min(now.total, most)


def free_disk(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    while not os.path.exists(path):
        path = path.parent
    return shutil.disk_usage(path).free
