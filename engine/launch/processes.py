"""The processes of a folder, a run's or another job's: found by the marker in their environment, and ended."""

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
    """Every process that carries the run's marker, whatever session, group or parent it has.

    A pid alone is never trusted: psutil compares the start time before it signals.
    """
    marker = f"{command.RUN_VARIABLE}={folder}".encode()
    processes = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            process = psutil.Process(int(entry.name))  # first: it remembers when the process began
            if marker in Path(entry.path, "environ").read_bytes().split(b"\0"):
                processes.append(process)
    return processes


def wake_supervisor(run: RunDir) -> None:
    """Let a supervisor go on that was suspended (SIGSTOP, or a debugger): it could obey no request.

    The pid in keeper.json is believed only where the process began when the file says.
    """
    written = read_object(run.keeper)
    with contextlib.suppress(psutil.Error, OSError, TypeError, ValueError):
        supervisor = psutil.Process(written.get("pid"))
        if supervisor.status() == psutil.STATUS_STOPPED and start_ticks(supervisor.pid) == written.get("start_ticks"):
            supervisor.resume()


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since the machine did: unlike a time of
    day, no correction of the clock moves it. Raises OSError if there is none."""
    # Its name, in parentheses, may hold anything; behind it the fields are numbers, of which this is the 22nd.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19])


def end_processes(folder: Path, kill_timeout_s: float = KILL_TIMEOUT_SECONDS) -> None:
    """SIGTERM every process of the run, and after a grace period SIGKILL, until none is left."""
    deadline = time.monotonic() + kill_timeout_s
    terminated: set[psutil.Process] = set()
    # One that ends loses its environment first, and what it holds of a card only some moments later.
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
    """Whether it still holds anything: what is left of a zombie is its exit
    code, once its last thread has ended, too."""
    try:
        ended = process.status() == psutil.STATUS_ZOMBIE and len(os.listdir(f"/proc/{process.pid}/task")) == 1
        return process.is_running() and not ended  # the pid may be another's by now
    except (psutil.NoSuchProcess, OSError):
        return False
