"""The small detached parent process of one run.

It has its own session, so it outlives the studio. It holds the run's lock; starts the steps of the run's kind (for a
training, `prepare` and the launcher); obeys stop requests; records stalls; ends every remaining process of the run; and
writes exit.json last. `engine.runs.outcome` judges what it saw.

    python -m engine.runs.supervisor keep FOLDER [UUID …]   become the supervisor of a run on these GPUs; returns once
                                                            it holds the lock of the run and the leases of the GPUs
    python -m engine.runs.supervisor end FOLDER             end every process of a run whose supervisor is gone

Started by `engine.runs.standby`, with `handover.PLACE` for the folder, it waits for the run on its standard input.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from engine.core import hardware, leases, regular_files
from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.run_errors import write_error
from engine.core.rundir import ALIVE_BYTE, SUPERVISED_BYTE, RunDir, read_object, write_json
from engine.core.sockets import reserve_port
from engine.launch import command, handover
from engine.launch.command import Step
from engine.launch.processes import end_processes, start_ticks
from engine.runs import attempts, engines, kinds, notify, queue
from engine.runs.allotment import NO_GPUS, Allotted, Leased
from engine.runs.outcome import determine_outcome, disk_is_full, requested_stop
from engine.runs.progress import read_long_curves
from engine.runs.quota_watch import QuotaWatch
from engine.runs.run import read
from engine.runs.stall import StallWatch
from engine.runs.standby_launcher import StandbyLauncher
from engine.spec.run_spec import RunSpec, Spec

POLL_S = 0.3
RESERVED_BYTES = 64 << 10  # for exit.json
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def supervise(
    run: RunDir,
    leased: Allotted = NO_GPUS,
    launcher: StandbyLauncher | None = None,
    record: Mapping[str, Any] | None = None,
) -> int:
    """The processes of one attempt, from the first to the last; returns the exit code. The caller already holds the
    lock and the leases, and writes exit.json. A `launcher` that exists already is used if it fits; `record`: what else
    keeper.json says."""
    spec = kinds.read(regular_files.read_text(run.spec))
    gpus = leased.gpus(spec)
    # Kept from other programs until the processes meet there, which may be an hour of preparation later.
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    with hardware.limited_to(gpus):
        steps = kinds.KINDS[spec.kind].steps(spec, run.path, port, len(gpus))
    steps = [leased.adapted(step, spec) for step in steps]
    environment = command.inherited_environment() | command.environment(spec, run.path, gpus, hardware.threads())
    environment |= leases.environment(leased.uuids, str(run.path))
    if precision := attempts.decided_precision(run):
        environment[command.PRECISION_VARIABLE] = precision
    own = {"port": port, "leases": list(leased.uuids), "command": steps[-1].arguments}
    _write_keeper(run, environment, own | dict(record or {}))
    watches = _watches(run, spec)
    if launcher and not (isinstance(spec, RunSpec) and launcher.fits(spec, gpus)):
        launcher.end()
        launcher = None
    code = 0
    # Preparation begins first: the launcher of a standby may be importing, and answer only after some seconds.
    children = {
        number: _start(step, environment, run, leased, launcher if step.waits else None)
        for number, step in enumerate(steps)
        if (number == 0 or step.waits) and not requested_stop(run)
    }
    for number, step in enumerate(steps):
        if code == 0:
            if requested_stop(run):
                code = -signal.SIGTERM  # a step that has not begun was ended, too
                break
            child = children.get(number) or _start(step, environment, run, leased)
            later = [other for place, other in children.items() if place > number]
            code = _wait_for_child(step, child, later, run, watches)
    end_processes(run.path)
    reserved.close()
    return code


def _watches(run: RunDir, spec: Spec) -> list[Callable[[Step], None]]:
    """What looks at the run every now and then, whatever its step is, and may request its end."""
    stall = StallWatch(run, spec.logging.stall_minutes if isinstance(spec, RunSpec) else 0)
    watches: list[Callable[[Step], None]] = [lambda step: stall.look() if step.saves else None]  # others have no steps
    if read_object(run.request).get("sweep"):
        from engine.runs.sweep_watch import SweepWatch  # other runs need not wait for what it imports

        sweep = SweepWatch(read(run.path, queue.saves_of(run.path)))
        sweep.look()  # Slurm starts it even if the sweep has no budget left
        watches.append(lambda _: sweep.look())
    if read_object(run.request).get("by"):
        quota = QuotaWatch(read(run.path, queue.saves_of(run.path)))
        watches.append(lambda step: quota.look(step.saves))
    return watches


def _write_keeper(run: RunDir, environment: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """Say that this process supervises the attempt, and where."""
    begins = {log.name: log.stat().st_size for log in run.logs()}  # what is before belongs to earlier attempts
    content: dict[str, Any] = {
        "pid": os.getpid(),
        "started": time.time(),
        "process_started": psutil.Process().create_time(),
        "start_ticks": start_ticks(os.getpid()),
        "attempt": run.attempt(),
        "log_from": begins[run.log.name],
        "logs_from": begins,
        "precision": environment.get(command.PRECISION_VARIABLE, ""),
        "devices": environment["CUDA_VISIBLE_DEVICES"],
    }
    write_json(run.keeper, {**content, **record})


def write_exit(run: RunDir, code: int, **changes: Any) -> None:
    """How the attempt ended; if the disk is full, in the space that was reserved for it."""
    outcome = determine_outcome(run, code) | changes
    run.reserve.unlink(missing_ok=True)
    write_json(run.exit, outcome)


def reserve_space(run: RunDir) -> bool:
    """Whether the run can start, with space reserved for its end; not on a full disk, or with a quota that is used up.
    On a file system that cannot reserve space, nothing is reserved."""
    try:
        if disk_is_full(run):
            return False
        descriptor = regular_files.open_descriptor(run.reserve, os.O_WRONLY | os.O_CREAT)
        try:
            os.posix_fallocate(descriptor, 0, RESERVED_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno not in FULL_ERRORS
    return True


def give_up(run: RunDir, error: BaseException) -> None:
    """Record that the supervisor itself has failed; not if the disk is too full even for that."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
    full = isinstance(error, OSError) and error.errno in FULL_ERRORS
    with contextlib.suppress(OSError):
        run.reserve.unlink(missing_ok=True)
        queue.give_up(run, 1, "disk-full" if full or disk_is_full(run) else "no-keeper")


def _start(
    step: Step, environment: dict[str, str], run: RunDir, leased: Allotted, launcher: StandbyLauncher | None = None
) -> subprocess.Popen[bytes]:
    """Start a child of the run, or let a `launcher` that exists already take the step if it answers."""
    print(f"$ {' '.join(step.arguments)}", flush=True)
    if launcher and (child := launcher.hand_over(run, step, environment | dict(step.environment), leased.descriptors)):
        return child
    return leased.start(step, environment, run)


def _wait_for_child(
    step: Step,
    child: subprocess.Popen[bytes],
    later: Sequence[subprocess.Popen[bytes]],
    run: RunDir,
    watches: Sequence[Callable[[Step], None]],
) -> int:
    """Let a child begin, if it waits, and return its exit code when it ends (minus the signal that ended it); or, as
    soon as one whose turn comes `later` has failed, that of this one: then the child is ended.

    If there is nothing to save yet, stop-and-save ends it like kill.
    """
    if child.stdin:
        with contextlib.suppress(BrokenPipeError):  # it has already failed, as its exit code will show
            child.stdin.write(b"begin\n")
            child.stdin.close()
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            stop_request = requested_stop(run)
            if stop_request == "kill" or (stop_request == "save" and not step.saves):
                end_processes(run.path)
            notify.look_sometimes(run)
            if failed := next((other.returncode for other in later if other.poll()), 0):
                end_processes(run.path)
                child.wait()
                return failed
            for look in watches:
                look(step)


def _end_at_shutdown(folder: Path, *_: Any) -> NoReturn:
    end_processes(folder)
    os._exit(143)


def become_supervisor(folder: Path, uuids: Sequence[str] = ()) -> int:
    """Detach, take the lock and the leases of the GPUs, supervise the run. Returns in the caller's process once they
    are held: 0; 1 if another supervisor has the run, `queue.GPUS_TAKEN` if another has leased one of the GPUs."""
    read_end, write_end = os.pipe()
    if child := os.fork():
        os.close(write_end)
        with os.fdopen(read_end, "rb") as answer:
            return 0 if answer.read() == b"held" else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(read_end)
    os.setsid()

    def report() -> None:
        os.write(write_end, b"held")
        os.close(write_end)

    return _supervise_to_end(RunDir(folder), report, uuids)


def stand_by() -> int:
    """Detach, and start a launcher that imports; then wait for a run and supervise it like any other. Returns in the
    caller's process at once. Ends without a run as `StandbyLauncher.wait_for_run` says."""
    studio = socket.socket(fileno=os.dup(0))
    if os.fork():
        return 0
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        handover.send(studio, {"pid": os.getpid()})
        message, _ = handover.receive(studio)
        launcher = StandbyLauncher(Step(**message["step"]))
        folder, uuids, queue_lock = launcher.wait_for_run(studio, message["idle_seconds"])
        if not handover.write_folder(folder):
            raise ValueError("the path is too long")
    except (OSError, EOFError, ValueError):
        os._exit(1)  # and with it the launcher

    def report() -> None:
        os.close(queue_lock)
        try:
            handover.send(studio, {"held": True})
        except OSError:
            os._exit(1)  # the studio has not waited, and starts the run as ever
        studio.close()

    return _supervise_to_end(RunDir(Path(folder)), report, uuids, launcher)


def _supervise_to_end(
    run: RunDir, report: Callable[[], None], uuids: Sequence[str], launcher: StandbyLauncher | None = None
) -> NoReturn:
    """Take the lock of the run and the leases of its GPUs, `report` that, and supervise the run."""
    supervisor_lock = try_lock(run.lock, SUPERVISED_BYTE, shared=False)
    if supervisor_lock is None:
        os._exit(1)
    chosen = uuids or queue.uuids_for(run)
    try:
        descriptors = None if chosen is None else leases.take(chosen, _holder(run))
    except OSError:  # the queue says why, and the run waits on
        descriptors = None
    if chosen is None or descriptors is None:
        os._exit(queue.GPUS_TAKEN)
    alive_lock = try_lock(run.lock, ALIVE_BYTE, shared=True)
    assert alive_lock is not None  # nobody locks this byte exclusively
    log = regular_files.open_descriptor(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)  # and no longer the lock of the queue: see `queue._start`
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    report()
    # If the machine shuts down, the run is interrupted, not judged: no exit.json, and it can be resumed.
    signal.signal(signal.SIGTERM, functools.partial(_end_at_shutdown, run.path))
    try:
        leases.keep_touched(chosen)
        if reserve_space(run):
            _supervise_or_refuse(run, Leased(chosen, descriptors), launcher)
        else:  # it keeps waiting, as its page says
            run.reserve.unlink(missing_ok=True)
    except BaseException as error:
        give_up(run, error)
    for lock in (*descriptors, alive_lock, supervisor_lock):
        os.close(lock)
    if run.exit.exists():  # otherwise the disk is full: no run can start, and a studio's tick will try again
        _stop_sweep_without_budget(run)
        with contextlib.suppress(OSError, Refusal):
            engines.advance(queue.saves_of(run.path))
        read_long_curves(run)
    os._exit(0)


def _stop_sweep_without_budget(run: RunDir) -> None:
    """If the run has used up the budget of its sweep, let none of those that wait begin."""
    sweep = read_object(run.request).get("sweep")
    if isinstance(sweep, dict) and sweep.get("budget_hours"):
        from engine.runs.sweep_watch import stop_without_budget  # as in `_watches`

        stop_without_budget(queue.saves_of(run.path), str(sweep.get("id")), time.time())


def _holder(run: RunDir) -> leases.Holder:
    saves = queue.saves_of(run.path)
    started = read(run.path, saves)
    return leases.Holder(started.title, started.kind, by=started.by, saves=str(saves), owner=str(run.path))


def _supervise_or_refuse(run: RunDir, leased: Leased, launcher: StandbyLauncher | None) -> None:
    try:
        code = supervise(run, leased, launcher)
    except Refusal as refusal:
        code = note_refusal(run, refusal)
    write_exit(run, code)


def note_refusal(run: RunDir, refusal: Refusal) -> int:
    """Record why the run cannot be supervised; returns its exit code."""
    with contextlib.suppress(OSError):  # a rank has written one, or the disk is full
        write_error(run, refusal)
    return 1


def main() -> int:
    if sys.argv[2] == handover.PLACE:
        return stand_by()
    verb, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    return become_supervisor(folder, sys.argv[3:]) if verb == "keep" else end_orphans(folder)


def end_orphans(folder: Path) -> int:
    """End what is alive of a run without a supervisor, supervise it for that long, and start the next waiting run.
    Returns 1 if it has a supervisor.

    A run that has ended by itself and was resumed meanwhile keeps waiting.
    """
    run = RunDir(folder)
    supervisor_lock = try_lock(run.lock, SUPERVISED_BYTE, shared=False)
    if supervisor_lock is None:
        return 1
    alive_lock = try_lock(run.lock, ALIVE_BYTE, shared=True)
    end_processes(folder)
    if run.keeper.exists() and not run.exit.exists():
        write_exit(run, -signal.SIGKILL)
    for lock in filter(None, (alive_lock, supervisor_lock)):
        os.close(lock)
    engines.advance(queue.saves_of(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
