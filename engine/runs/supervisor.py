"""The small detached parent of one run.

It is a session of its own, so it outlives the studio; holds the run's lock; starts what the run's kind says, of a
training `prepare` and the launcher; obeys stop requests; ends whatever process of the run is left; and writes exit.json
last. What it saw is judged by `engine.runs.outcome`.

    python -m engine.runs.supervisor keep FOLDER    become the keeper of a run; returns once the keeper holds the lock
    python -m engine.runs.supervisor end FOLDER     end every process of a run whose keeper is gone
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil

from engine.core import hardware
from engine.core.rundir import ALIVE, KEPT, RunDir, take, write_json
from engine.launch import command
from engine.launch.command import Step
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT
from engine.runs import kinds, queue
from engine.runs.outcome import judge, stop_wanted
from engine.runs.progress import read_long_curves

POLL_S = 0.3


def free_port() -> int:
    """A TCP port that was free a moment ago, so that no two runs meet at accelerate's default."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def keep(run: RunDir) -> None:
    """The whole life of one attempt, from the lock to exit.json. The caller holds the lock already."""
    spec = kinds.read(run.spec.read_text(encoding="utf-8"))
    cards, port = len(hardware.gpus()), free_port()
    steps = kinds.KINDS[spec.kind].steps(spec, run.path, port, cards)
    environment = command.inherited() | command.environment(spec, run.path, cards, hardware.threads())
    log_from = run.log.stat().st_size  # what stands before it is an earlier attempt's
    write_json(run.keeper, {
        "pid": os.getpid(), "started": time.time(), "process_started": psutil.Process().create_time(),
        "attempt": run.attempt(), "port": port, "log_from": log_from, "devices": environment["CUDA_VISIBLE_DEVICES"], "command": steps[-1].arguments,
    })  # fmt: skip
    code, early = (
        0,
        {number: _start(step, environment, run) for number, step in enumerate(steps) if step.waits},
    )
    for number, step in enumerate(steps):
        if code == 0 and not stop_wanted(run):
            code = _see_through(step, early.get(number) or _start(step, environment, run), run)
    end_processes(run.path)
    write_json(run.exit, judge(run, code))


def _start(step: Step, environment: dict[str, str], run: RunDir) -> subprocess.Popen[bytes]:
    """Start a child of the run; one that waits has a pipe as its standard input, which ends if the keeper does."""
    print(f"$ {' '.join(step.arguments)}", flush=True)
    # The descriptor of the lock goes along: what takes no lock itself must count as alive, too.
    lock = take(run.lock, ALIVE, shared=True)
    told = environment | step.environment | ({command.WAITS: "1"} if step.waits else {})
    child = subprocess.Popen(
        step.arguments, env=told, cwd=PROJECT, stdin=subprocess.PIPE if step.waits else subprocess.DEVNULL,
        pass_fds=(lock,),
    )  # fmt: skip
    os.close(lock)
    return child


def _see_through(step: Step, child: subprocess.Popen[bytes], run: RunDir) -> int:
    """Let a child begin, if it waits, and return its exit code when it ends (minus the signal that ended it).

    Where there is nothing to save yet, stop-and-save ends it like kill.
    """
    if child.stdin:
        with contextlib.suppress(BrokenPipeError):  # it has failed already, as its exit code will say
            child.stdin.write(b"begin\n")
            child.stdin.close()
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            wanted = stop_wanted(run)
            if wanted == "kill" or (wanted == "save" and not step.saves):
                end_processes(run.path)


def become_keeper(folder: Path) -> int:
    """Detach, take the lock, keep the run. Returns in the caller's process once the lock is held: 0, or 1 if
    another keeper has the run."""
    heard, told = os.pipe()
    if os.fork():
        os.close(told)
        with os.fdopen(heard, "rb") as answer:
            return 0 if answer.read() == b"held" else 1
    os.close(heard)
    os.setsid()
    run = RunDir(folder)
    kept = take(run.lock, KEPT, shared=False)
    if kept is None:
        os._exit(1)
    alive = take(run.lock, ALIVE, shared=True)
    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, standard)
    os.write(told, b"held")
    os.close(told)
    # A machine that shuts down leaves the run interrupted, not judged: no exit.json, and resume is offered.
    signal.signal(signal.SIGTERM, lambda *_: (end_processes(folder), os._exit(143)))
    try:
        keep(run)
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            queue.give_up(run, 1)
    os.close(alive)
    os.close(kept)
    if run.exit.exists():  # else the disk is full, and a studio's tick will try again
        with contextlib.suppress(OSError):
            queue.advance(queue.saves_of(folder))
        read_long_curves(run)
    os._exit(0)


def main() -> int:
    verb, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    return become_keeper(folder) if verb == "keep" else end_orphans(folder)


def end_orphans(folder: Path) -> int:
    """End what lives of a run without a keeper, and be its keeper for that long. Returns 1 if it has one."""
    run = RunDir(folder)
    if take(run.lock, KEPT, shared=False) is None:
        return 1
    take(run.lock, ALIVE, shared=True)
    end_processes(folder)
    if not run.exit.exists():
        write_json(run.exit, judge(run, -signal.SIGKILL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
