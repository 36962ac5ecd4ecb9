"""The supervisor of a run on Slurm: the batch step of its job, on the first of its machines.

    python -m engine.runs.slurm_batch FOLDER SECONDS

It does what the local one does, but is started by Slurm, takes no lock, and uses the devices that it is given. A run of
several machines is launched on each of them by srun. So many seconds before its time is over (SIGUSR1), it lets the
training save a checkpoint and asks Slurm to start the job again, which then is another attempt of the same run. If
Slurm itself does so, because a machine has failed or to make room for others, the next attempt continues from the last
checkpoint. Evaluations and exports have nothing to save: they use all the time that they have.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.hardware import Gpu
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_object, step_of
from engine.launch import command
from engine.launch.command import Step
from engine.launch.engine_choice import EngineChoice
from engine.launch.machine import missing_gpus
from engine.launch.processes import end_processes
from engine.runs import attempts, queue, slurm, slurm_queue, supervisor
from engine.runs.allotment import start_child
from engine.runs.life import keep_beating
from engine.runs.outcome import ends_for_good, pause, requested_stop
from engine.spec.run_spec import RunSpec, Spec

END_SECONDS = 5.0  # for processes to end by themselves once Slurm ends the job
REQUEUE_SECONDS = 60.0  # until Slurm has ended a job that it was asked to start again
EARLY_SECONDS = 60  # by which Slurm may send the signal sooner than it was asked to


@dataclass(frozen=True)
class Allocation:
    """The machines of this job, as Slurm describes them in the environment."""

    run: RunDir
    uuids: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()

    def gpus(self, spec: Spec) -> tuple[Gpu, ...]:
        """Those of this machine that Slurm has given to the job; none if the run was submitted for the CPU. Raises
        Refusal if there are fewer than processes here: the run does not use the CPU instead."""
        if queue.is_for_cpu(self.run, spec):
            return ()
        if missing := missing_gpus(spec.hardware.processes_per_machine):
            raise Refusal(missing)
        return hardware.gpus()

    def adapted(self, step: Step, spec: Spec) -> Step:
        """What every machine of a run takes part in is started on each of them. It cannot wait for its turn there."""
        machines = spec.hardware.machines
        if machines == 1 or not step.everywhere:
            return step
        address = slurm.address_of(os.environ.get("SLURMD_NODENAME", "")) or socket.gethostname()
        launch = [sys.executable, "-m", "engine.launch.machine", str(self.run.path), address, "--", *step.arguments]
        return replace(step, arguments=[*srun(machines), *launch], waits=step.waits and not step.saves)

    def start(self, step: Step, environment: dict[str, str], run: RunDir) -> subprocess.Popen[bytes]:
        """Start a child of the run. What it has to know of its devices, it is told: its machine may see a change in the
        run's folder late, and have other GPUs."""
        names = [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
        own = {hardware.GPUS_VARIABLE: str(len(names))} | (command.connection_variables(run) if step.saves else {})
        return start_child(step, environment | own)


def srun(machines: int) -> list[str]:
    """Start a command once on each machine of the job; if one fails, the others are ended."""
    return [
        "srun", f"--nodes={machines}", f"--ntasks={machines}", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
        "--cpu-bind=none", "--mpi=none", "--input=none",
    ]  # fmt: skip


def keep(run: RunDir, job: str, warning_s: float) -> None:
    """The whole life of one attempt, which is warned so long before its end. Does nothing if the run has ended, or if
    it has another job."""
    if not slurm_queue.claim(run, job) or run.exit.exists():
        print(f"Job {job} is not needed: {run.path.name} has ended, or has another job.", flush=True)
        return
    put_last_aside(run)
    keep_beating(run)
    signal.signal(signal.SIGUSR1, functools.partial(_pause, run))
    signal.signal(signal.SIGTERM, functools.partial(_end, run))
    before = newest_step(run)
    try:
        if not supervisor.reserve_space(run):
            raise OSError(supervisor.FULL_ERRORS[0], os.strerror(supervisor.FULL_ERRORS[0]))
        record: dict[str, Any] = {"job": job, "machines": os.environ.get("SLURM_JOB_NODELIST", "")}
        record |= {"resumed_from": before} if run.attempt() > 1 else {}
        _conclude(run, job, supervisor.supervise(run, Allocation(run), record=record), before, warning_s)
    except Refusal as refusal:
        supervisor.write_exit(run, supervisor.note_refusal(run, refusal))
    except BaseException as error:
        supervisor.give_up(run, error)


def put_last_aside(run: RunDir) -> None:
    """Put the files of an attempt that Slurm has ended among those of the earlier ones. A warning for one that had not
    begun means nothing to the next."""
    if run.keeper.exists():
        attempts.put_aside(run, read_object(run.keeper).get("attempt") or run.attempt())
    run.pause.unlink(missing_ok=True)


def newest_step(run: RunDir) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return max(map(step_of, run.checkpoints()), default=0)


def _conclude(run: RunDir, job: str, code: int, before: int, warning_s: float) -> None:
    """Write exit.json; or, if only the time was over, let Slurm start the job again. Not if the attempt has failed, or
    saved nothing until its time limit: the next one would get no further. After a preemption, it would."""
    if not run.pause.exists() or run.error.exists() or ends_for_good(run) or _is_complete(run):
        supervisor.write_exit(run, code)
        return
    is_saved = newest_step(run) > before
    left = None if is_saved else slurm.seconds_left(job)
    if left is not None and left <= warning_s + EARLY_SECONDS:
        supervisor.write_exit(run, code, outcome="failed", reason="slurm-time")
    elif failure := slurm.requeue(job):
        print(f"Slurm does not start the job again: {failure}", flush=True)
        failed = {} if is_saved else {"outcome": "failed", "reason": "slurm-not-again"}
        supervisor.write_exit(run, code, **failed)  # with a checkpoint, it is stopped: it can be resumed
    else:
        time.sleep(REQUEUE_SECONDS)  # Slurm ends this process


def _is_complete(run: RunDir) -> bool:
    """Whether this attempt has finished after all."""
    folder = run.left()
    result: dict[str, Any] = read_object(folder / RESULT_FILE) if folder else {}
    return bool(result) and bool(result.get("complete")) and result.get("attempt") == run.attempt()


def _pause(run: RunDir, *_: Any) -> None:
    """The time is nearly over."""
    if read_object(run.request).get("kind", RunSpec.kind) == RunSpec.kind:
        with contextlib.suppress(OSError):
            pause(run, again=True)


def _end(run: RunDir, *_: Any) -> None:
    """Slurm ends the job. If that was requested here, the supervisor goes on to record it; otherwise the run is
    interrupted, or starts again: no exit.json."""
    if requested_stop(run) != "kill":
        end_processes(run.path, END_SECONDS)
        os._exit(143)


def _keep(folder: Path, job: str) -> int:
    seconds = EngineChoice().warning_seconds if len(sys.argv) < 3 else int(sys.argv[2])  # a job of an older version
    keep(RunDir(folder), job, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(slurm.in_job(_keep))
