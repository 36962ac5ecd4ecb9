"""What the GPUs are doing: who has leased each, and which processes compute on it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from engine.core import hardware, leases
from engine.core.gpu_choice import others_bytes
from engine.core.hardware import Gpu
from engine.core.leases import Holder, plain

MAX_COMMAND_CHARACTERS = 60


@dataclass(frozen=True)
class Process:
    """A process on a GPU; `user` and `command` are "" if they cannot be seen from here. `memory` is in bytes."""

    pid: int
    user: str
    command: str
    memory: int | None


@dataclass(frozen=True)
class GpuUse:
    """A GPU, and who uses it; `others`: without a lease, processes of others compute on it."""

    gpu: Gpu
    holder: Holder | None
    processes: tuple[Process, ...]

    @property
    def others(self) -> bool:
        return self.holder is None and others_bytes(self.gpu) is not None


def gpu_uses() -> list[GpuUse]:
    """All usable GPUs, at most a few seconds old."""
    holders = leases.holders()
    return [GpuUse(gpu, holders.get(gpu.uuid), _processes(gpu)) for gpu in hardware.gpus()]


def _processes(gpu: Gpu) -> tuple[Process, ...]:
    return tuple(Process(process.pid, *_names(process.pid), process.memory) for process in gpu.processes)


def _names(pid: int) -> tuple[str, str]:
    """The user and the command of a process; "" where they cannot be seen."""
    try:
        process = psutil.Process(pid)
        command = _without_arguments(process.cmdline()) or process.name()
        return plain(process.username()), plain(command)[:MAX_COMMAND_CHARACTERS]
    except (psutil.Error, OSError, KeyError):
        return "", ""


def _without_arguments(words: list[str]) -> str:
    """A program, with the script or module that it runs; arguments may be secret."""
    program, *others = words or [""]
    kept = [program]
    if others[:1] == ["-m"]:
        kept += others[:2]
    elif others and not others[0].startswith("-") and "=" not in others[0]:
        kept.append(others[0])
    return " ".join(kept)
