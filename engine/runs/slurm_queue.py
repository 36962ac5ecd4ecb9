"""Slurm as an engine: hands waiting runs to it, tells why they wait, and ends them. It decides who starts, and where.

A run is handed over once its slurm.json names a job. The file is created, never replaced, so that of two studios that
submit a run at the same moment, on two machines even, one wins; the other cancels its job.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import Problem, Refusal, problem
from engine.core.run_errors import write_error
from engine.core.rundir import RunDir, read_object, write_json
from engine.launch import command
from engine.launch.engine_choice import EngineChoice, read_choice, sbatch_options
from engine.launch.workspace import PROJECT
from engine.runs import index, queue, slurm
from engine.runs.life import job_of
from engine.runs.outcome import determine_outcome, requested_stop
from engine.runs.queue import Place
from engine.runs.run import Run
from engine.runs.schedule import Decision
from engine.spec.run_spec import Spec

RETRY_SECONDS = 15.0  # after sbatch has refused a run
WARNING_SECONDS = 120  # before the time limit or a preemption: for a checkpoint


def advance(saves: Path, _hand_over: queue.HandOver | None = None) -> None:
    """Hand every waiting run to Slurm, and record the end of those that were killed before they could do so."""
    lock = wait_for_lock(saves / ".slurm.lock")  # not that of the queue: sbatch may take its time
    try:
        for run in index.open_runs(saves):
            if run.state == "queued" and not (run.dir.on_slurm() or run.request.get("damaged")):
                if not _hand_to_slurm(run, read_choice(saves)):
                    break  # the others would hardly fare better; a later call tries again
            elif run.state == "interrupted" and run.dir.on_slurm() and requested_stop(run.dir) == "kill":
                write_json(run.dir.exit, determine_outcome(run.dir, -9))
    finally:
        os.close(lock)


def _hand_to_slurm(run: Run, choice: EngineChoice) -> bool:
    """False if Slurm has refused it just now."""
    refused = read_object(run.dir.slurm_refused)
    if isinstance(refused.get("at"), (int, float)) and time.time() < refused["at"] + RETRY_SECONDS:
        return True
    try:
        spec = run.spec
    except Refusal as refusal:
        write_error(run.dir, refusal)
        write_json(run.dir.exit, determine_outcome(run.dir, 1))
        return True
    environment = queue.supervisor_environment()
    id, failure = slurm.submit(script(run.path), options(run, spec, choice), environment)
    if id is None:
        write_json(run.dir.slurm_refused, {"why": failure, "at": time.time()})
        return False
    if not claim(run.dir, id) or run.dir.exit.exists():  # handed over, or stopped, by another in the meantime
        slurm.cancel(id)
    run.dir.slurm_refused.unlink(missing_ok=True)
    slurm.forget()
    return True


def script(folder: Path) -> str:
    """The batch script: Slurm's signals reach the supervisor itself."""
    return f"#!/bin/sh\nexec {shlex.join([sys.executable, '-m', 'engine.runs.slurm_batch', str(folder)])}\n"


def options(run: Run, spec: Spec, choice: EngineChoice) -> list[str]:
    """The options of sbatch for a run. The operator's come last, and so override ours."""
    machines, each = spec.hardware.machines, spec.hardware.processes_per_machine
    on_cpu = command.on_cpu(spec, choice.gpus_per_machine)
    return [
        f"--job-name=athanor-{run.path.name}",
        f"--nodes={machines}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={each}" if on_cpu else f"--gres=gpu:{each}",
        f"--chdir={PROJECT}",
        f"--output={str(run.dir.log).replace('%', '%%')}",
        "--open-mode=append",
        "--export=ALL",
        "--requeue",
        f"--signal=B:USR1@{WARNING_SECONDS}",
        *sbatch_options(choice),
    ]


def claim(run: RunDir, job: str) -> bool:
    """Make a job the one of the run's current attempt. False if it has another."""
    content: Mapping[str, Any] = {"job": job, "user": getpass.getuser(), "submitted": time.time()}
    try:
        descriptor = os.open(run.slurm, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return str(read_object(run.slurm).get("job")) == job
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return True


# ------------------------------------------------------------------------------------------ what waits, and its end


def place(run: Run) -> Place | None:
    """Where a run is in Slurm's queue; None if it does not wait."""
    if run.state != "queued":
        return None
    if not run.dir.on_slurm():
        why = read_object(run.dir.slurm_refused).get("why")
        return Place(None, Decision(reason=problem("slurm-refused", why=why) if why else problem("slurm-not-yet")))
    job, answer = job_of(run.dir)
    if answer.failure:
        return Place(None, Decision(reason=problem("slurm-silent", why=answer.failure)))
    reason = job.reason if job and job.reason not in ("", "None") else "—"
    return Place(None, Decision(reason=problem("slurm-waits", job=read_object(run.dir.slurm).get("job"), why=reason)))


def end(run: Run, how: str, waited: bool) -> None:
    """Carry out a stop request that has been written. Raises Refusal if Slurm does not obey."""
    if (waited or how == "kill") and run.dir.on_slurm():
        withdraw(run.dir)


def withdraw(run: RunDir) -> None:
    """Cancel the job of a run. Raises Refusal."""
    if job := read_object(run.slurm).get("job"):
        failure = slurm.cancel(str(job))
        slurm.forget()
        if failure and "Invalid job id" not in failure:  # it has ended long ago
            raise Refusal(problem("slurm-failed", job=job, why=failure))


def left(run: RunDir) -> Problem | None:
    """That the job of an attempt that has ended may still have processes."""
    slurm.forget()  # what was said some seconds ago is too old for this
    job, _ = job_of(run)
    return problem("slurm-still-there", job=job.id) if job and (job.alive or job.waits) else None
