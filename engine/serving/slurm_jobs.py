"""The Slurm job of a chat server: submitting it, what it waits for, why it has ended, and cancelling it.

What it does on its machine: `engine.serving.slurm_batch`. A server has a folder before it has a job, and none after its
end. The first who claims the folder decides (`slurm_queue.claim`): whoever submits a job, or the job itself if its
number could not be noted; or whoever unloads the server, and then it gets none.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.run_errors import write_error
from engine.core.rundir import HEARTBEAT_LOST_SECONDS, RunDir, end_of, heartbeat_age, read_object, write_json
from engine.launch.engine_choice import EngineChoice, cores_of_gpus, sbatch_options
from engine.launch.workspace import PROJECT
from engine.models.facts import inspect_model
from engine.preflight.memory import size_text
from engine.runs import queue, slurm, slurm_queue
from engine.runs.life import job_of, life
from engine.serving.server_gpu import weight_bytes

SUBMIT_SECONDS = slurm.COMMAND_LIMIT_SECONDS + 10.0  # until a folder without a job counts as left by its studio
END_SECONDS = 30.0  # for Slurm to end a job
NO_JOB = ""  # claims the folder of a server that is to get no job
ENDED_FILE = "slurm_ended.json"  # how the job has ended, which squeue forgets after some minutes
# What Slurm calls the end of a job that it has ended itself, in squeue, and in the job's output.
ENDED_BY_SLURM = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
END_LINE = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
STATE_OF_CAUSE = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}


def submit(folder: RunDir, settings: Mapping[str, Any], choice: EngineChoice) -> None:
    """Submit the job of a server. Raises Refusal if Slurm does not accept it, which error.json then says to all who
    wait for the server, or if it has been unloaded meanwhile; or OSError."""
    job, failure = slurm.submit(script(folder), options(folder, settings, choice), queue.supervisor_environment())
    slurm.forget()
    settled = NO_JOB
    try:
        settled = _settle(folder, job or NO_JOB)
    finally:
        if job and settled != job:
            slurm.cancel(job)
    if settled:  # perhaps one that has begun although sbatch's answer came too late
        return
    if job or not folder.path.exists():
        raise Refusal(problem("chat-was-unloaded", name=settings["name"]))
    try:
        raise Refusal(problem("chat-slurm-refused", name=settings["name"], why=failure))
    except Refusal as refusal:
        with contextlib.suppress(OSError):  # the disk is full: others learn that it has ended
            write_error(folder, refusal)
        raise


def _settle(folder: RunDir, job: str) -> str:
    """The job that the folder has from now on: `job`, if it has no other; NO_JOB if it is gone. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if slurm_queue.claim(folder, job):
            return job
    return str(read_object(folder.slurm).get("job", NO_JOB))


def script(folder: RunDir) -> str:
    """The batch script: Slurm's signals reach the program itself."""
    return f"#!/bin/sh\nexec {shlex.join([sys.executable, '-m', 'engine.serving.slurm_batch', str(folder.path)])}\n"


def options(folder: RunDir, settings: Mapping[str, Any], choice: EngineChoice) -> list[str]:
    """The options of sbatch. The operator's come last, and so override ours."""
    gpus = settings["slurm"]["gpus"]
    cores = cores_of_gpus(choice, [*choice.sbatch, *choice.chat_sbatch])
    return [
        f"--job-name=athanor-chat-{folder.path.name}",
        "--nodes=1",
        "--ntasks-per-node=1",
        *([f"--gres=gpu:{gpus}", *cores] if gpus else ["--cpus-per-task=1"]),
        f"--chdir={PROJECT}",
        f"--output={str(folder.log).replace('%', '%%')}",
        "--open-mode=append",
        "--export=ALL",
        "--no-requeue",  # nobody may be there any more who would ask it
        *sbatch_options(choice),
        *choice.chat_sbatch,
    ]


def slurm_settings(choice: EngineChoice, base: str, loading: Mapping[str, Any]) -> dict[str, Any]:
    """What serve.json says of the job: how many GPUs it gets. `loading` is the `model` part of a spec. Raises Refusal
    if the weights alone do not fit into a GPU."""
    gpus = min(choice.gpus_per_machine, 1)
    needed, room = weight_bytes(base, loading), choice.gpu_memory_gb * 1e9
    if gpus and room and needed > room:
        name = inspect_model(base).name
        raise Refusal(problem("chat-too-large", name=name, needed=size_text(needed), room=size_text(room)))
    return {"gpus": gpus}


# ------------------------------------------------------------------------------------------ its state, and its end


def phase(folder: RunDir, since: float) -> Literal["waits", "alive", "gone"]:
    """Whether the job has processes. `since`: when the folder was made; Slurm gets the job a moment later."""
    if any(path.exists() for path in (folder.path / "ended.json", folder.error, folder.path / ENDED_FILE)):
        return "gone"
    if not folder.on_slurm():
        return "waits" if folder.path.exists() and time.time() < since + SUBMIT_SECONDS else "gone"
    return life(folder).phase


def why_waiting(folder: RunDir) -> Problem:
    """What the job waits for."""
    return slurm_queue.why_waiting(folder) if folder.on_slurm() else problem("slurm-not-yet")


def doubt(folder: RunDir) -> Problem | None:
    """That Slurm does not answer, so that the job may have ended."""
    return life(folder).doubt if folder.on_slurm() else None


def why_ended(folder: RunDir, name: str) -> Problem | None:
    """Why the job of the server `name` has ended or never begun; None if it ended by itself, as far as it is known."""
    if not folder.on_slurm():
        return problem("chat-not-submitted", name=name)
    state = read_object(folder.path / ENDED_FILE).get("state")
    if state is None:
        job, _ = job_of(folder)
        state = job.state if job else _end_in_output(folder)
    if state not in ENDED_BY_SLURM:
        return None
    return problem("chat-job-ended", name=name, job=read_object(folder.slurm).get("job"), why=state)


def note_end(folder: RunDir) -> None:
    """Note how the job has ended, once it has. What squeue has forgotten, the job's output or Slurm's accounting may
    say; otherwise, that nobody knows is noted, so that nobody asks again. Raises OSError."""
    id = str(read_object(folder.slurm).get("job", NO_JOB))
    if id == NO_JOB or (folder.path / ENDED_FILE).exists() or life(folder).phase != "gone":
        return
    job, answer = job_of(folder)
    beats = heartbeat_age(folder) < HEARTBEAT_LOST_SECONDS  # as far as is seen: a file system may show it late
    if answer.failure or (job.waits or job.alive if job else beats):
        return
    state = job.state if job else _end_in_output(folder) or slurm.accounted_state(id)
    with contextlib.suppress(FileNotFoundError):  # unloaded in the meantime
        write_json(folder.path / ENDED_FILE, {"job": id, "state": state, "at": time.time()})


def _end_in_output(folder: RunDir) -> str:
    """The end of the job as Slurm has noted it in its output; "" if it has not."""
    lines = END_LINE.findall(end_of(folder.log, 20_000).decode("utf-8", "replace"))
    return STATE_OF_CAUSE.get(lines[-1].strip(), "CANCELLED") if lines else ""


def cancel(folder: RunDir, name: str, waits: bool = True) -> None:
    """End the job of a server and, if it `waits`, return once that has no processes. Whoever is submitting it cancels
    it. Raises Refusal if Slurm does not do so."""
    if not _has_job(folder):
        return
    failure: Refusal | None = None
    try:
        slurm_queue.withdraw(folder)
    except Refusal as refusal:
        failure = refusal  # unless it has ended by itself
    deadline = time.monotonic() + END_SECONDS
    while (waits or failure) and slurm_queue.left(folder):
        if failure:
            raise failure
        if time.monotonic() > deadline:
            raise Refusal(problem("chat-still-ending", name=name, job=read_object(folder.slurm).get("job", NOTHING)))
        time.sleep(0.2)


def _has_job(folder: RunDir) -> bool:
    """Whether a server has a job. If not, it gets none from now on."""
    try:
        return bool(_settle(folder, NO_JOB))
    except OSError:  # the disk is full; one that is not noted finds no folder
        return folder.on_slurm()
