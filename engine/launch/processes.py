"""Find the processes of a run's or job's folder by the marker in their environment, and end them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

from engine.core.rundir import RunDir, read_object
from engine.launch import command

KILL_TIMEOUT_SECONDS = 10.0  # between SIGTERM and SIGKILL


def find_processes(folder: Path) -> list[psutil.Process]:
    """Every process that carries the run's marker, whatever its session, group or parent.

    A pid alone is never trusted: psutil compares the start time before it signals.
    """
    marker = f"{command.RUN_VARIABLE}={folder}".encode()
    processes = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            process = psutil.Process(int(entry.name))  # first, so that it records the start time of the process
            if marker in Path(entry.path, "environ").read_bytes().split(b"\0"):
                processes.append(process)
    return processes


def memory_in_use(folder: Path) -> int:
    """The bytes of main memory that the processes of a run have to themselves, without the files that they have mapped,
    whose memory counts as free."""
    total = 0
    for process in find_processes(folder):
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def wake_supervisor(run: RunDir) -> None:
    """Continue a supervisor that was suspended (SIGSTOP, or a debugger) and could obey no request.

    The pid in keeper.json is trusted only if the start time of the process matches the file.
    """
    written = read_object(run.keeper)
    with contextlib.suppress(psutil.Error, OSError, TypeError, ValueError):
        supervisor = psutil.Process(written.get("pid"))
        if supervisor.status() == psutil.STATUS_STOPPED and start_ticks(supervisor.pid) == written.get("start_ticks"):
            supervisor.resume()


def start_ticks(pid: int) -> int:
    """The start time of a process in clock ticks since boot, which unlike wall time does not change when the clock is
    corrected. Raises OSError if there is no such process."""
    # Its name, in parentheses, may contain anything; the fields after it are numbers, of which this is the 22nd.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19])


def end_processes(folder: Path, kill_timeout_s: float = KILL_TIMEOUT_SECONDS) -> None:
    """SIGTERM to every process of the run, and SIGKILL after a grace period, until none is left."""
    deadline = time.monotonic() + kill_timeout_s
    terminated: set[psutil.Process] = set()
    # A process that ends loses its environment first, and its GPU memory only some moments later.
    while alive := {*find_processes(folder), *filter(_is_alive, terminated)}:
        late = time.monotonic() > deadline
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process not in terminated:
                    process.terminate()
                    terminated.add(process)
        time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still holds anything: once its last thread has ended, only the exit code of a zombie is left."""
    try:
        ended = process.status() == psutil.STATUS_ZOMBIE and len(os.listdir(f"/proc/{process.pid}/task")) == 1
        return process.is_running() and not ended  # the pid may belong to another process by now
    except (psutil.NoSuchProcess, OSError):
        return False
