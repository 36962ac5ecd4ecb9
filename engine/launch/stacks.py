"""The Python stacks of a run's processes, each written by faulthandler in the process itself when a signal asks for it.

So nothing has to inspect a process from outside. py-spy does that: it needs ptrace, which a container without
SYS_PTRACE or a system with a strict yama.ptrace_scope denies, and it has to know the memory layout of each Python
version. The handler is C code, which runs while the interpreter waits in a system call or for a GPU; it writes into
memory, whatever happens to a disk or a pipe.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path

import psutil

from engine.launch.processes import find_processes

STACKS_FILE = "athanor-stacks"  # name of the file in memory; a process that has it open also has the handler
STACKS_SIGNAL = signal.SIGUSR2
ANSWER_SECONDS = 2.0  # until a process is assumed not to answer
QUIET_SECONDS = 0.1  # without a further line until an answer is complete


def offer_stacks() -> None:
    """Let `read_stacks` query this process and its forked children."""
    faulthandler.register(STACKS_SIGNAL, os.memfd_create(STACKS_FILE))  # stays open until the process ends


def read_stacks(folder: Path) -> str:
    """What every thread of each process of the run is doing, the innermost call first. Processes that do not offer
    their stacks are left out."""
    parts = []
    for process in find_processes(folder):
        with contextlib.suppress(OSError, psutil.Error):  # it has ended in the meantime
            if file := _stacks_file(process.pid):
                command_line = " ".join(process.cmdline()[1:])
                rank = process.environ().get("RANK", "0")
                parts.append(f"process {process.pid}, rank {rank}: {command_line}\n{_ask(process, file)}")
    return "\n\n".join(parts)


def _stacks_file(pid: int) -> Path | None:
    """The path of the process's file in memory; None if it has none. Without the handler, the signal would end the
    process."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    return next((file for file in files if os.readlink(file).startswith(f"/memfd:{STACKS_FILE}")), None)


def _ask(process: psutil.Process, file: Path) -> str:
    before = size = file.stat().st_size
    process.send_signal(STACKS_SIGNAL)
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        grown = file.stat().st_size
        if grown == size > before:
            break
        size = grown
    if size == before:
        return f"(no answer: the process is {process.status()})"
    with file.open("rb") as answer:
        answer.seek(before)
        return answer.read().decode("utf-8", errors="replace").rstrip()
