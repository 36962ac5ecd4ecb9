"""The Slurm job of a chat server: submitting it, what it waits for, why it has ended, and cancelling it.

What it does on its machine: `engine.serving.slurm_batch`. A server has a folder before it has a job, and none after its
end; so a job whose number nobody could note either takes the folder that it finds (`slurm_queue.claim`), or ends.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.rundir import RunDir, end_of, read_object
from engine.launch.engine_choice import EngineChoice, sbatch_options
from engine.launch.workspace import PROJECT
from engine.models.facts import inspect_model
from engine.preflight.memory import size_text
from engine.runs import queue, slurm, slurm_queue
from engine.runs.life import job_of, life
from engine.spec.model_settings import Model

SUBMIT_SECONDS = slurm.COMMAND_LIMIT_SECONDS + 10.0  # until a folder without a job counts as left by its studio
END_SECONDS = 30.0  # for Slurm to end a job
# What Slurm calls the end of a job that it has ended itself, in squeue, and in the job's output, where it stays.
ENDED_BY_SLURM = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
END_LINE = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
STATE_OF_CAUSE = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}
BYTES_PER_WEIGHT = {"none": 2.0, "8bit": 1.0, "4bit": 0.5}  # at least, once it is loaded


def submit(folder: RunDir, settings: Mapping[str, Any], choice: EngineChoice) -> None:
    """Submit the job of a server. Raises Refusal if Slurm does not accept it, or OSError."""
    job, failure = slurm.submit(script(folder), options(folder, settings, choice), queue.supervisor_environment())
    if job is None:
        raise Refusal(problem("chat-slurm-refused", name=settings["name"], why=failure))
    if not slurm_queue.claim(folder, job):  # the job of an earlier try, whose answer was late, has begun
        slurm.cancel(job)
    slurm.forget()


def script(folder: RunDir) -> str:
    """The batch script: Slurm's signals reach the program itself."""
    return f"#!/bin/sh\nexec {shlex.join([sys.executable, '-m', 'engine.serving.slurm_batch', str(folder.path)])}\n"


def options(folder: RunDir, settings: Mapping[str, Any], choice: EngineChoice) -> list[str]:
    """The options of sbatch. The operator's come last, and so override ours."""
    gpus = settings["slurm"]["gpus"]
    return [
        f"--job-name=athanor-chat-{folder.path.name}",
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--gres=gpu:{gpus}" if gpus else "--cpus-per-task=1",
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
    model, kind = inspect_model(base), Model(**loading).quantization.kind
    needed = model.bytes if model.quantized else BYTES_PER_WEIGHT.get(kind, 0.5) * (model.parameters or 0)
    room = choice.gpu_memory_gb * 1e9
    if gpus and room and needed > room:
        raise Refusal(problem("chat-too-large", name=model.name, needed=size_text(needed), room=size_text(room)))
    return {"gpus": gpus}


# ------------------------------------------------------------------------------------------ its state, and its end


def phase(folder: RunDir, since: float) -> Literal["waits", "alive", "gone"]:
    """Whether the job has processes. `since`: when the folder was made; Slurm gets the job a moment later."""
    if (folder.path / "ended.json").exists() or folder.error.exists():
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
    """Why Slurm has ended the job of the server `name`; None if it has not, as far as it is known."""
    job, _ = job_of(folder)
    state = job.state if job and job.state in ENDED_BY_SLURM else _noted_end(folder)
    return problem("chat-job-ended", name=name, job=read_object(folder.slurm).get("job"), why=state) if state else None


def _noted_end(folder: RunDir) -> str | None:
    """The end of the job as Slurm has noted it in its output: squeue forgets it after some minutes."""
    lines = END_LINE.findall(end_of(folder.log, 20_000).decode("utf-8", "replace"))
    return STATE_OF_CAUSE.get(lines[-1].strip(), "CANCELLED") if lines else None


def cancel(folder: RunDir, name: str) -> None:
    """End the job of a server, and wait until it has no processes. Raises Refusal if Slurm does not do so."""
    if not folder.on_slurm():  # a job that has not been noted will find no folder
        return
    failure: Refusal | None = None
    try:
        slurm_queue.withdraw(folder)
    except Refusal as refusal:
        failure = refusal  # unless it has ended by itself
    deadline = time.monotonic() + END_SECONDS
    while slurm_queue.left(folder):
        if failure:
            raise failure
        if time.monotonic() > deadline:
            raise Refusal(problem("chat-still-ending", name=name, job=read_object(folder.slurm).get("job", NOTHING)))
        time.sleep(0.2)
