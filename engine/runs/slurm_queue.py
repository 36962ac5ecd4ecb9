"""Slurm as an engine: hands waiting runs to it, tells why they wait, and ends them. It decides who starts, and where.

A run is handed over once its slurm.json names a job. The file is created, never replaced, so that of two studios that
submit a run at the same moment, on two machines even, one wins; the other cancels its job.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine.core.locks import holding
from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.run_errors import write_error
from engine.core.run_warnings import write_warning
from engine.core.rundir import TURN_BYTE, RunDir, read_object, write_json
from engine.launch.engine_choice import EngineChoice, cores_of_gpus, read_choice, sbatch_options
from engine.launch.workspace import PROJECT
from engine.preflight.checks import engine_problems
from engine.runs import index, queue, slurm
from engine.runs.life import job_of
from engine.runs.outcome import determine_outcome, disk_is_full, requested_stop
from engine.runs.queue import Place
from engine.runs.run import ALIVE_STATES, Run
from engine.runs.schedule import Decision, kept_back
from engine.spec.run_spec import Spec

RETRY_SECONDS = 15.0  # after sbatch has failed
NICE = 10_000  # by which a low priority is below, and a high above, that of other jobs of the same age and kind


def advance(saves: Path, _hand_over: queue.HandOver | None = None) -> None:
    """Hand every waiting run to Slurm, and record the end of those that were killed before they could do so."""
    with holding(saves / ".slurm.lock"):  # not that of the queue: sbatch may take its time
        open_runs = index.open_runs(saves)
        for run in open_runs:
            if run.state == "interrupted" and run.dir.on_slurm() and requested_stop(run.dir) == "kill":
                with contextlib.suppress(OSError):  # deleted in the meantime, or the disk is full: only this one fails
                    write_json(run.dir.exit, determine_outcome(run.dir, -9))
        for run, reason in _decisions(saves, open_runs):
            with contextlib.suppress(OSError):
                if reason is None and not _hand_to_slurm(run, read_choice(saves)):
                    break  # the others would hardly fare better; a later call tries again


def _decisions(saves: Path, open_runs: Sequence[Run]) -> list[tuple[Run, Problem | None]]:
    """The runs that are to be handed over, in their order, and why one is kept back: it is on hold, or its owner has as
    many runs with Slurm as are allowed at once."""
    queued = queue.waiting_among(open_runs)
    owners = {run.by for run in queued}
    (limits, wrong), used_up = queue.limits_at_once(saves, owners), queue.without_hours(saves, owners)
    running = Counter(run.by for run in open_runs if _is_handed_over(run))
    decisions = []
    for run in queued:
        reason = kept_back(bool(run.request.get("held")), run.by, running, limits, used_up) or (
            wrong if run.by else None
        )
        running[run.by] += reason is None
        decisions.append((run, reason))
    return decisions


def _is_handed_over(run: Run) -> bool:
    """Whether it is alive, or Slurm may start it at any moment."""
    return run.state in ALIVE_STATES or (run.state == "queued" and run.dir.on_slurm())


def _hand_to_slurm(run: Run, choice: EngineChoice) -> bool:
    """False if that has failed just now for a reason that may apply to others. Raises OSError for one of its own."""
    refused = read_object(run.dir.slurm_refused)
    if isinstance(refused.get("at"), (int, float)) and time.time() < refused["at"] + RETRY_SECONDS:
        return True
    if disk_is_full(run.dir):  # then it could not be noted that Slurm has it
        return True
    try:
        spec = run.spec
        if wrong := engine_problems(spec.hardware, queue.saves_of(run.path)):
            raise Refusal(wrong)
    except Refusal as refusal:
        with contextlib.suppress(OSError):
            write_error(run.dir, refusal)
        write_json(run.dir.exit, determine_outcome(run.dir, 1))
        return True
    id, failure = _submit(run, spec, choice, after_failure=bool(refused))
    if id is None:
        write_json(run.dir.slurm_refused, {"why": failure, "at": time.time()})
        return False
    _note(run.dir, id)
    return True


def _submit(run: Run, spec: Spec, choice: EngineChoice, after_failure: bool) -> tuple[str | None, str]:
    """The job of a run that has none yet, or None and why there is none. An sbatch that has failed may have submitted
    one all the same, as when the answer was late: then that is taken."""
    if after_failure:
        slurm.forget()
        answer = slurm.jobs_of(str(os.getuid()))
        if answer.failure:
            return None, answer.failure
        name = job_name(run)
        if known := [job for job in (answer.jobs or {}).values() if job.name == name and (job.waits or job.alive)]:
            return known[0].id, ""
    return slurm.submit(script(run.path, choice), options(run, spec, choice), queue.supervisor_environment())


def _note(run: RunDir, job: str) -> None:
    """Record that Slurm has the run; cancel the job if it cannot be the run's: that has another, was stopped or deleted
    in the meantime, or the disk is full. Raises OSError."""
    is_claimed = False
    try:
        is_claimed = claim(run, job) and not run.exit.exists()
    finally:
        if not is_claimed:
            slurm.cancel(job)
        slurm.forget()
    run.slurm_refused.unlink(missing_ok=True)
    if is_claimed:
        with holding(run.lock, TURN_BYTE):
            _pass_turn_on(run)


def _pass_turn_on(run: RunDir) -> None:
    """Let Slurm hold a run that is to be held, and give it its priority; if Slurm refuses, the run waits like others,
    and says so. Raises OSError."""
    request = read_object(run.request)  # as it is now: somebody may have changed it while sbatch took its time
    for field, change, usual in (("priority", "priority", 0), ("held", "hold", False)):
        if not request.get(field):
            continue
        try:
            reorder(run, change)
        except Refusal as refusal:
            with queue.locked(queue.saves_of(run.path)):
                write_json(run.request, read_object(run.request) | {field: usual})
            write_warning(run, refusal.problems[0], 0)


def script(folder: Path, choice: EngineChoice) -> str:
    """The batch script: Slurm's signals reach the supervisor itself. A warning that comes before it can obey must not
    end it."""
    program = shlex.join([sys.executable, "-m", "engine.runs.slurm_batch", str(folder), str(choice.warning_seconds)])
    return f"#!/bin/sh\ntrap '' USR1\nexec {program}\n"


def options(run: Run, spec: Spec, choice: EngineChoice) -> list[str]:
    """The options of sbatch for a run. The operator's come last, and so override ours."""
    machines, each = spec.hardware.machines, spec.hardware.processes_per_machine
    on_cpu = queue.is_for_cpu(run.dir, spec)
    return [
        f"--job-name={job_name(run)}",
        f"--nodes={machines}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={each}"] if on_cpu else [f"--gres=gpu:{each}", *cores_of_gpus(choice, choice.sbatch)]),
        f"--chdir={PROJECT}",
        f"--output={str(run.dir.log).replace('%', '%%')}",
        "--open-mode=append",
        "--export=ALL",
        "--requeue",
        f"--signal=B:USR1@{choice.warning_seconds}",
        *sbatch_options(choice),
    ]


def job_name(run: Run) -> str:
    """The name of the job, which no other attempt of any run has."""
    key = f"{run.path}\n{run.request.get('attempt')}"  # which each resume changes
    return f"athanor-{run.path.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def claim(run: RunDir, job: str) -> bool:
    """Make a job the one of the run's current attempt. False if it has another. Raises OSError.

    The file appears with its content: half of it would be taken for another job.
    """
    content = {"job": job, "user": str(os.getuid()), "submitted": time.time()}
    own = run.path / f".slurm-{uuid.uuid4().hex}"
    try:
        write_json(own, content)
        os.link(own, run.slurm)
    except FileExistsError:
        return str(read_object(run.slurm).get("job")) == job
    finally:
        own.unlink(missing_ok=True)
    return True


# ------------------------------------------------------------------------------------------ what waits, and its end


def place(run: Run) -> Place | None:
    """Where a run is in Slurm's queue; None if it does not wait."""
    if run.state != "queued":
        return None
    if not run.dir.on_slurm():
        saves = queue.saves_of(run.path)
        reasons = {other.path: reason for other, reason in _decisions(saves, index.open_runs(saves))}
        if reason := reasons.get(run.path):
            return Place(None, Decision(reason=reason))
        why = read_object(run.dir.slurm_refused).get("why")
        return Place(None, Decision(reason=problem("slurm-refused", why=why) if why else problem("slurm-not-yet")))
    return Place(None, Decision(reason=why_waiting(run.dir)))


def why_waiting(run: RunDir) -> Problem:
    """What the job of a folder waits for, as Slurm says it."""
    job, answer = job_of(run)
    if answer.failure:
        return problem("slurm-silent", why=answer.failure)
    why = job.reason if job and job.reason not in ("", "None") else NOTHING
    return problem("slurm-waits", job=read_object(run.slurm).get("job"), why=why)


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


def reorder(run: RunDir, change: str) -> None:
    """Carry out a change of a run's turn; nothing if it has not been handed over. The caller holds its TURN_BYTE.
    Raises Refusal if Slurm does not know the change, or does not obey: a high priority takes its permission."""
    job = read_object(run.slurm).get("job")
    if job is None:
        return
    request = read_object(run.request)
    hold = ("uhold", str(job))  # which the owner of the job may release, whoever holds it
    words = {
        "hold": hold,
        "release": ("release", str(job)),
        "first": ("top", str(job)),
        "priority": ("update", f"JobId={job}", f"Nice={-NICE * request.get('priority', 0)}"),
    }
    if change not in words:  # it was possible until the run was handed over, a moment ago
        raise Refusal(problem("slurm-orders"))
    failure = slurm.change(words[change])
    if request.get("held") and change == "priority":
        failure = slurm.change(hold) or failure  # Slurm releases a job whose nice value changes
    slurm.forget()
    if failure:
        raise Refusal(problem("slurm-turn", job=job, why=failure))


def left(run: RunDir) -> Problem | None:
    """That the job of an attempt that has ended has processes, or may have some because Slurm does not answer."""
    slurm.forget()  # what was said some seconds ago is too old for this
    job, answer = job_of(run)
    if answer.failure:
        return problem("slurm-still-unknown", job=read_object(run.slurm).get("job"), why=answer.failure)
    return problem("slurm-still-there", job=job.id) if job and (job.alive or job.waits) else None
