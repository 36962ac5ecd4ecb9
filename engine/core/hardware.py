"""What this machine has: cards, cores, memory, disk. Asks nvidia-smi, so that no process but a worker opens a CUDA context."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # of the kernel's second kind, as a container sees its own
NVIDIA_SMI_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")


@dataclass(frozen=True)
class Gpu:
    """One card. Memory in bytes. A number that the driver does not tell is 0."""

    index: int
    uuid: str
    name: str
    memory: int
    free: int
    capability: float


def gpus() -> tuple[Gpu, ...]:
    """The cards of this machine, as of at most five seconds ago; none where there is no NVIDIA driver."""
    return _query_gpus(int(time.monotonic() // 5))


@lru_cache(maxsize=1)
def _query_gpus(_five_seconds: int) -> tuple[Gpu, ...]:
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(
        _parse_gpu(line) for line in answer.splitlines() if line.count(",") == len(NVIDIA_SMI_FIELDS) - 1
    )


def _parse_gpu(line: str) -> Gpu:
    index, uuid, name, total, free, capability = (cell.strip() for cell in line.split(","))
    mebibyte = 2**20
    return Gpu(
        int(_number(index)), uuid, name, int(_number(total)) * mebibyte, int(_number(free)) * mebibyte,
        _number(capability),
    )  # fmt: skip


def _number(cell: str) -> float:
    """0 for [N/A], which a card says that shares the memory of the machine, or is divided."""
    try:
        return float(cell)
    except ValueError:
        return 0


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
