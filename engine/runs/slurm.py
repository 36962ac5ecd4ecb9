"""Slurm's commands and their answers: submitting, asking about and cancelling jobs. Knows nothing of specs.

Whoever looks at runs gets the newest answer of squeue that there is: one call tells all jobs of a user, and a call that
hangs keeps nobody waiting for long. What the commands print is parsed by pure functions.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.core.problems import problem

# Of an answer, from when it came: as long as it is fresh, it is used as it is; then it is used once more while another
# is asked for; once it is old, the caller waits for the other, up to a limit from when that was asked for.
FRESH_SECONDS, OLD_SECONDS = 1.5, 10.0
SQUEUE_LIMIT_SECONDS, WAIT_LIMIT_SECONDS = 10.0, 3.0
COMMAND_LIMIT_SECONDS = 20.0  # of commands that change something
FIELDS = "%i|%T|%r|%j"
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE_STATES = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")


@dataclass(frozen=True)
class Job:
    """What squeue says of a job. `reason`: why it waits, in Slurm's word."""

    id: str
    state: str
    reason: str = ""
    name: str = ""

    @property
    def waits(self) -> bool:
        """Whether it has not been started, or is to be started again."""
        return self.state in WAITING_STATES

    @property
    def alive(self) -> bool:
        """Whether it may have processes."""
        return self.state in ALIVE_STATES


@dataclass(frozen=True)
class Answer:
    """The jobs of a user at a moment (seconds since 1970, before squeue was called). `failure`: why there is no newer
    answer, in Slurm's words; then the jobs are those of the last answer, and None if there has been none."""

    at: float
    jobs: Mapping[str, Job] | None
    failure: str = ""


def parse_jobs(text: str) -> dict[str, Job]:
    """The output of squeue with `FIELDS`: id → job. Lines that are something else are left out."""
    jobs = {}
    for line in text.splitlines():
        parts = line.split("|", 3)
        if len(parts) == 4 and parts[0].isdecimal():
            jobs[parts[0]] = Job(*parts)
    return jobs


def parse_submitted(text: str) -> str | None:
    """The job's id in the output of `sbatch --parsable`, which may add the name of the cluster; None if there is
    none."""
    id = text.strip().rpartition("\n")[2].partition(";")[0]
    return id if id.isdecimal() else None


def complaint(text: str) -> str:
    """The reason in what a command has printed to standard error, in one line: "sbatch: error: " says nothing."""
    lines = [line.partition("error: ")[2] or line for line in text.strip().splitlines()]
    return "; ".join(filter(None, (line.strip() for line in lines)))[:500] or "—"


def in_job(step: Callable[[Path, str], int]) -> int:
    """Do a batch step with the folder in this process's arguments and the id of its job; return the exit status."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job:
        print(problem("slurm-not-in-job").text(), file=sys.stderr)
        return 2
    return step(Path(sys.argv[1]), job)


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment for a command: one of a job that this process may itself be part of would change what it does."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    foreign = ("SLURM", "SBATCH_", "SQUEUE_", "SALLOC_", "SRUN_")
    return {name: value for name, value in base.items() if name in kept or not name.startswith(foreign)}


def run(
    words: Sequence[str], limit_s: float, text: str = "", variables: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Run a command with `text` as its input → what it prints, and why it failed, "" if it did not. A command that does
    not end within the limit is killed; it is not waited for, since it may hang in a file system."""
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment(os.environ if variables is None else variables),
        )
    except OSError as error:
        return "", f"{words[0]}: {error.strerror or error}"
    try:
        output, errors = child.communicate(text, timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        threading.Thread(target=child.wait, daemon=True, name="slurm").start()  # avoids a zombie
        return "", f"{words[0]}: no answer within {limit_s:.0f} s"
    return output, "" if child.returncode == 0 else complaint(errors)


def submit(script: str, options: Sequence[str], variables: Mapping[str, str]) -> tuple[str | None, str]:
    """Submit a batch script → the job's id, or None and why not."""
    output, failure = run(["sbatch", "--parsable", *options], COMMAND_LIMIT_SECONDS, script, variables)
    id = parse_submitted(output)
    return (id, "") if id and not failure else (None, failure or f"sbatch: {output.strip()[:200]}")


def cancel(id: str) -> str:
    """End a job, or take it out of the queue → why that failed, "" if it did not."""
    return run(["scancel", id], COMMAND_LIMIT_SECONDS)[1]


def requeue(id: str) -> str:
    """Let Slurm start a job again, which ends its processes → why that failed, "" if it did not."""
    return change(["requeue", id])


def change(words: Sequence[str]) -> str:
    """Let scontrol do something → why that failed, "" if it did not."""
    return run(["scontrol", *words], COMMAND_LIMIT_SECONDS)[1]


def accounted_state(id: str) -> str:
    """The state of a job that squeue has forgotten, as Slurm's accounting has it; "" if it does not know, or there is
    none."""
    words = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={id}"]
    return parse_state(run(words, COMMAND_LIMIT_SECONDS)[0])


def parse_state(text: str) -> str:
    """The state in the last line of sacct's output, without who has cancelled the job; "" if there is none."""
    return next(iter(text.strip().rpartition("\n")[2].split()), "")


def seconds_left(id: str) -> float | None:
    """For how long a job may still run by its time limit, whoever wants to end it sooner; infinite without a limit,
    None if Slurm does not tell."""
    return parse_time_left(run(["squeue", f"--jobs={id}", "--noheader", "--format=%L"], COMMAND_LIMIT_SECONDS)[0])


def parse_time_left(text: str) -> float | None:
    """Seconds from squeue's days-hours:minutes:seconds; None if the text is something else."""
    if text.strip() in ("UNLIMITED", "NOT_SET"):
        return math.inf
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if parts is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def address_of(node: str) -> str:
    """The address of a node as Slurm has it; "" if it does not tell."""
    return parse_address(run(["scontrol", "--oneliner", "show", "node", node], COMMAND_LIMIT_SECONDS)[0])


def parse_address(text: str) -> str:
    """NodeAddr in the output of `scontrol show node`; "" if there is none."""
    return next((word.partition("=")[2] for word in text.split() if word.startswith("NodeAddr=")), "")


# ------------------------------------------------------------------------------------------ one answer for everybody


@dataclass
class _Inquiry:
    """The newest answer about a user's jobs and when it, or the failure, came; the call that is under way and when it
    began. Times are monotonic, in seconds."""

    answer: Answer | None = None
    came: float = 0.0
    busy: threading.Thread | None = None
    began: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


_inquiries: dict[str, _Inquiry] = {}
_turn = threading.Lock()


def jobs_of(user: str) -> Answer:
    """What squeue says of a user's jobs. One call serves all who ask within a second or two, and nobody waits for
    longer than until `WAIT_LIMIT_SECONDS` after it began: a call that hangs is waited for once."""
    with _turn:
        inquiry = _inquiries.setdefault(user, _Inquiry())
    with inquiry.lock:
        answer, now = inquiry.answer, time.monotonic()
        age = now - inquiry.came
        if answer and age < FRESH_SECONDS:
            return answer
        if inquiry.busy is None or not inquiry.busy.is_alive():
            inquiry.busy = threading.Thread(target=_ask, args=(user, inquiry), daemon=True, name="squeue")
            inquiry.began = now
            inquiry.busy.start()
        busy, wait = inquiry.busy, inquiry.began + WAIT_LIMIT_SECONDS - now
    if answer is None or age > OLD_SECONDS:
        busy.join(max(wait, 0))
    return inquiry.answer or Answer(time.time(), None, f"squeue: no answer within {WAIT_LIMIT_SECONDS:.0f} s")


def forget() -> None:
    """Let the next look ask again: this process has changed something."""
    with _turn:
        _inquiries.clear()


def _ask(user: str, inquiry: _Inquiry) -> None:
    at = time.time()
    words = ["squeue", f"--user={user}", "--states=all", "--noheader", f"--format={FIELDS}"]
    output, failure = run(words, SQUEUE_LIMIT_SECONDS)
    known = inquiry.answer.jobs if failure and inquiry.answer else None
    inquiry.came = time.monotonic()
    inquiry.answer = Answer(at, known, failure) if failure else Answer(at, parse_jobs(output))
