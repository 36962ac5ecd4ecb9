"""The hardware of this machine: GPUs, cores, memory, disk. Only workers open a CUDA context."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.core import leases
from engine.core.problems import Problem, problem

CGROUP = Path("/sys/fs/cgroup")  # cgroup v2, as seen inside a container
# One of these exists wherever a driver is installed or was passed into a container or WSL.
DRIVER_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")
WSL_TRACE = "/dev/dxg"  # GPUs of any vendor: without NVIDIA's library, none of them is NVIDIA's
NO_CARDS = ("-1", "NoDevFiles", "none", "void")  # common values of CUDA_VISIBLE_DEVICES that hide all GPUs
UUIDS_VARIABLE = "ATHANOR_GPU_UUIDS"  # of a run's processes: the GPUs of its machine, separated by commas
GPUS_VARIABLE = "ATHANOR_GPUS"  # so many GPUs must be usable to a process, where nobody could try it before
QUERY_LIMIT_SECONDS = 10.0  # time limit for the driver's answer
QUERY_HOLDS_SECONDS, FAILURE_HOLDS_SECONDS = 5.0, 60.0


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU, and its memory there in bytes; None if the driver does not report it."""

    pid: int
    memory: int | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one (MIG). Memory is in bytes, and 0 if the driver does not report it.

    `index` is that of nvidia-smi; the slices of GPU n are numbered from 100 + 10 n. `processes` are those that compute
    on it, as far as they can be seen from here: in a container, often none. `utilization` is in percent, `temperature`
    in °C, `power` and its limit in watts; None if the driver does not report them.
    """

    index: int
    uuid: str
    name: str
    memory: int
    free: int
    capability: float
    processes: tuple[GpuProcess, ...] = ()
    utilization: int | None = None
    temperature: int | None = None
    power: float | None = None
    power_limit: float | None = None

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice of a GPU. A process sees only one of them, whatever it is given."""
        return self.uuid.startswith("MIG-")

    @property
    def cuda_name(self) -> str:
        """Its name in CUDA_VISIBLE_DEVICES."""
        return self.uuid if self.is_slice else str(self.index)


def gpus() -> tuple[Gpu, ...]:
    """The usable GPUs: those of CUDA_VISIBLE_DEVICES in its order, if it is set, otherwise all. Empty if there are none
    or the driver fails (see `gpu_failure`).

    The answer is at most a few seconds old, and no older than the end of a lease. Who compares it with
    `leases.holders()` reads those first: otherwise a lease that ends in between leaves processes of nobody.
    """
    limited = _limited.get()
    return limited if limited is not None else _visible(_cached_query()[0], os.environ.get("CUDA_VISIBLE_DEVICES"))


_limited: ContextVar[tuple[Gpu, ...] | None] = ContextVar("limited", default=None)


@contextlib.contextmanager
def limited_to(gpus: tuple[Gpu, ...]) -> Iterator[None]:
    """Within it, the usable GPUs are these, which a run has been given."""
    token = _limited.set(gpus)
    try:
        yield
    finally:
        _limited.reset(token)


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, as far as it is known here. `memory`: its main memory in bytes; None: unknown, like the
    number of its `cores`."""

    gpus: tuple[Gpu, ...] = ()
    memory: int | None = None
    cores: int | None = None


_node: Callable[[], Node | None] | None = None


def plan_for(node: Callable[[], Node | None] | None) -> None:
    """Let this process plan runs for the machines that `node` describes whenever it is asked; where it, or its answer,
    is None, for this machine."""
    global _node
    _node = node


def _planned_node() -> Node | None:
    return _node() if _node else None


def planned_gpus() -> tuple[Gpu, ...]:
    """The GPUs of a machine that runs compute on."""
    node = _planned_node()
    return node.gpus if node else gpus()


def planned_memory() -> int | None:
    """The main memory of such a machine in bytes; None if it is unknown."""
    node = _planned_node()
    return node.memory if node else memory()[1]


def planned_cores() -> int | None:
    """The CPU threads that a run has there (`threads`); None if they are unknown."""
    node = _planned_node()
    return node.cores if node else threads()


def planned_gpu_failure() -> Problem | None:
    """`gpu_failure`; None if runs compute on other machines than this one."""
    return None if plans_elsewhere() else gpu_failure()


def plans_elsewhere() -> bool:
    """Whether runs compute on other machines than this one."""
    return _planned_node() is not None


def all_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine, whatever CUDA_VISIBLE_DEVICES is."""
    return _cached_query()[0]


def driver_failure() -> Problem | None:
    """Why the driver does not list the GPUs, whatever CUDA_VISIBLE_DEVICES is."""
    return _cached_query()[1]


def may_have_gpus() -> bool:
    """Whether there is a trace of a driver; asks nobody."""
    return any(map(os.path.exists, (*DRIVER_TRACES, WSL_TRACE)))


def gpu_failure() -> Problem | None:
    """Why the GPUs cannot be listed, or that CUDA_VISIBLE_DEVICES matches none of them. None if the query works, even
    if there are no GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", *NO_CARDS):
        return None
    all_gpus, failure = _cached_query()
    if failure or visible is None or not all_gpus or _visible(all_gpus, visible):
        return failure
    there = ", ".join(str(gpu.index) for gpu in all_gpus)
    return problem("gpu-none-visible", "hardware.device", visible=visible, there=there)


def _visible(all_gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Read the variable as CUDA does: indices or prefixes of UUIDs, up to the first that matches no GPU."""
    if visible is None:
        return all_gpus
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        name = entry.strip()
        by_uuid = name.startswith(("GPU-", "MIG-"))
        fits = [gpu for gpu in all_gpus if name == str(gpu.index) or (by_uuid and gpu.uuid.startswith(name))]
        if len(fits) != 1 or fits[0] in chosen:
            break
        chosen += fits
    return tuple(chosen)


_turn = threading.Lock()
_last_query: tuple[float, tuple[tuple[Gpu, ...], Problem | None]] | None = None  # when it expires, and the answer
_leased: frozenset[str] = frozenset()  # the UUIDs of the GPUs that were leased when the driver answered


def _cached_query() -> tuple[tuple[Gpu, ...], Problem | None]:
    global _last_query, _leased
    with _turn:
        leased = frozenset(leases.holders())
        # The processes of a lease that has ended would pass for programs without a lease.
        if _last_query is None or time.monotonic() > _last_query[0] or not _leased <= leased:
            answer = _query_gpus()
            holds = FAILURE_HOLDS_SECONDS if answer[1] else QUERY_HOLDS_SECONDS
            _last_query, _leased = (time.monotonic() + holds, answer), leased.union(leases.holders())
        return _last_query[1]


def ask_driver_again() -> None:
    """Forget the last answer about the GPUs: who has asked for it knows that it is out of date."""
    global _last_query
    with _turn:
        _last_query = None


def _query_gpus() -> tuple[tuple[Gpu, ...], Problem | None]:
    """The GPUs of this machine, or why they cannot be listed. A machine without a driver has none."""
    driver = any(os.path.exists(trace) for trace in DRIVER_TRACES)
    if not driver and not os.path.exists(WSL_TRACE):
        return (), None
    try:
        answer = _ask_driver()
    except subprocess.TimeoutExpired:
        return (), problem("gpu-driver-silent", "hardware.device", seconds=int(QUERY_LIMIT_SECONDS))
    except (OSError, ValueError) as error:
        answer = {"error": str(error)}
    if "error" in answer:
        if not driver and not answer.get("library", True):
            return (), None
        return (), problem("gpu-driver-failed", "hardware.device", what=answer["error"])
    if answer["lost"] and not answer["gpus"]:
        return (), problem("gpu-driver-failed", "hardware.device", what=next(iter(answer["lost"].values())))
    return tuple(_gpu(fields) for fields in answer["gpus"]), None


def _gpu(fields: dict[str, Any]) -> Gpu:
    processes = tuple(GpuProcess(**process) for process in fields.pop("processes"))
    return Gpu(**fields, processes=processes)


def _ask_driver() -> dict[str, Any]:
    """Run the program that queries the driver. Raises TimeoutExpired, OSError, ValueError.

    A process that hangs inside the driver cannot be killed, so after SIGKILL its end is not awaited.
    """
    program = Path(__file__).with_name("gpu_query.py")
    child = subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = child.communicate(timeout=QUERY_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        threading.Thread(target=child.wait, daemon=True, name="gpu query").start()  # avoids a zombie, if it ever ends
        raise
    return json.loads(output or "null") or {"error": errors.strip().rpartition("\n")[2] or "—"}


def threads() -> int:
    """CPU threads for a run: OMP_NUM_THREADS if it is set, otherwise the cores available to this process."""
    match = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))  # 4,2 means 4 outer and 2 inner threads
    return int(match[1]) if match else len(os.sched_getaffinity(0))


def cpu_runs() -> int:
    """How many runs may use the CPU at once: ATHANOR_CPU_RUNS, otherwise as many as there are cores for."""
    most = os.environ.get("ATHANOR_CPU_RUNS", "")
    return int(most) if re.fullmatch(r"[1-9]\d{0,3}", most) else max(len(os.sched_getaffinity(0)) // threads(), 1)


def memory() -> tuple[int, int]:
    """Main memory available to this process in bytes: free now, and in total. In a container, its limit if that is
    lower."""
    now = psutil.virtual_memory()
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such cgroup, or "max": no limit
        return now.available, now.total
    # The page cache counts as used, but is freed when memory is needed.
    free = most - used + (int(kept[1]) if kept else 0)
    return min(now.available, max(free, 0)), min(now.total, most)


SPARED_BYTES = 1 << 30  # of the disk, which runs in progress need: what people bring leaves so much


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is or will be."""
    while not os.path.exists(path):
        path = path.parent
    return shutil.disk_usage(path).free
