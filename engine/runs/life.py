"""Whether a run's processes are alive, as the engine that has started them knows it.

Here, its lock decides. On other machines, no lock can be trusted: Slurm is asked about its job and, if it does not
answer, the supervisor's heartbeat. If neither says anything, the run is not called dead.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.core.problems import Problem, problem
from engine.core.rundir import HEARTBEAT_SECONDS, RunDir, heartbeat_age, read_object
from engine.runs import slurm
from engine.runs.slurm import Answer, Job

NOT_YET_LISTED_SECONDS = 5.0  # a job submitted so shortly before may be missing in squeue's answer


@dataclass(frozen=True)
class Life:
    """`phase`: "waits" for its start, "alive", or "gone". `begun`: the file that exists since the attempt was handed to
    the engine. `doubt`: why this may be out of date."""

    phase: Literal["waits", "alive", "gone"]
    begun: Path
    doubt: Problem | None = None


def life(run: RunDir) -> Life:
    """What is known of the processes of a run without an exit.json."""
    return _on_slurm(run) if run.on_slurm() else _here(run)


def _here(run: RunDir) -> Life:
    # In this order: a supervisor takes the lock and then writes keeper.json.
    supervised = os.path.lexists(run.keeper)
    if run.alive():
        return Life("alive", run.keeper)
    return Life("gone" if supervised else "waits", run.keeper)


def _on_slurm(run: RunDir) -> Life:
    submitted = read_object(run.slurm)
    answer = slurm.jobs_of(str(submitted.get("user", "")))
    if answer.failure:
        phase = _last_known(run, answer, submitted)
        return Life(phase, run.slurm, problem("slurm-silent", why=answer.failure))
    job = (answer.jobs or {}).get(str(submitted.get("job")))
    if job and (job.waits or job.alive):
        return Life("waits" if job.waits else "alive", run.slurm)
    if job is None and answer.at < _number(submitted.get("submitted")) + NOT_YET_LISTED_SECONDS:
        return Life("waits", run.slurm)
    # A controller that has lost the job ends it as soon as it hears of it; until then, the heart beats.
    is_lost = job is None and heartbeat_age(run) < 3 * HEARTBEAT_SECONDS
    return Life("alive" if is_lost else "gone", run.slurm)


def _last_known(run: RunDir, answer: Answer, submitted: dict[str, Any]) -> Literal["waits", "alive"]:
    """Without Slurm's word: alive if it has begun, whatever the age of the heartbeat: only Slurm can say that it has
    ended."""
    job = (answer.jobs or {}).get(str(submitted.get("job")))
    if job and job.waits and not run.alive():
        return "waits"
    return "alive" if os.path.lexists(run.keeper) else "waits"


def job_of(run: RunDir) -> tuple[Job | None, Answer]:
    """The job of a run on Slurm, if squeue lists it, and the whole answer."""
    submitted = read_object(run.slurm)
    answer = slurm.jobs_of(str(submitted.get("user", "")))
    return (answer.jobs or {}).get(str(submitted.get("job"))), answer


def keep_beating(run: RunDir) -> None:
    """Show that this process is alive, to whoever sees the folder, as long as it is."""
    threading.Thread(target=_beat, args=(run,), daemon=True, name="heartbeat").start()


def _beat(run: RunDir) -> None:
    while True:
        with contextlib.suppress(OSError):
            run.heartbeat.touch()
        time.sleep(HEARTBEAT_SECONDS)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0.0
