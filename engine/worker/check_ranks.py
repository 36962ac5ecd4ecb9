"""Try whether the processes of a training can communicate, on the devices that it has: `python -m
engine.worker.check_ranks [--machine_rank N] [--main_process_ip ADDRESS] --main_process_port PORT FOLDER`.

It runs while the rows are being prepared, and the training begins after it; of several machines, on each of them. If
the processes cannot communicate, they try it once more without direct connections between GPUs. If that works, the
training goes on in this way, and connection.json in the folder of the run says so.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import NoReturn

from engine.core.problems import Problem, Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import RunDir, step_of, write_json
from engine.spec.hardware_settings import Hardware
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.all_reduce import INDIRECT, Meeting, all_reduce_failure
from engine.worker.runtime.process_lifecycle import run_lifecycle

LIMIT_VARIABLE, LIMIT_SECONDS = "ATHANOR_RANKS_SECONDS", 60.0
MEETING_SECONDS = 300.0  # until all machines are there: each has to import PyTorch, over a network file system perhaps


def check(run: RunDir, machine: int, address: str, port: int) -> None:
    """Raises Refusal if the processes cannot communicate. Of several machines, the others leave that to the first."""
    if machine == 0:
        run.connection.unlink(missing_ok=True)  # of an earlier attempt
    import torch  # noqa: F401  # once for all that are forked

    chosen = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8")).hardware
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        meeting = Meeting(MEETING_SECONDS, chosen.machines, machine, address, port if chosen.machines > 1 else 0)
    except TimeoutError as error:
        raise Refusal(_apart(chosen, str(error))) from error
    why = _failure(chosen, meeting, {})
    if why and gpus and machine == 0:
        print(problem("ranks-again", "hardware.devices", **_values(chosen, gpus, why)).text(), flush=True)
    still = _failure(chosen, meeting, INDIRECT) if why and gpus else why
    meeting.leave()
    if machine == 0:
        _conclude(run, chosen, gpus, why, still)


def _failure(chosen: Hardware, meeting: Meeting, variables: dict[str, str]) -> str:
    """Why the processes cannot communicate with these variables, "" if they can."""
    backend = "gloo" if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else "nccl"
    return all_reduce_failure(chosen.processes_per_machine, backend, _limit(), variables, fork=True, meeting=meeting)


def _conclude(run: RunDir, chosen: Hardware, gpus: str, why: str, still: str) -> None:
    """Record that the processes can communicate only indirectly. Raises Refusal if they cannot at all."""
    if still and not gpus:
        raise Refusal(_apart(chosen, still))
    values = _values(chosen, gpus, why)
    if still:
        raise Refusal(problem("ranks-apart", "hardware.devices", **values, still=still))
    if why:
        warning = problem("ranks-indirect", "hardware.devices", **values)
        checkpoints = run.checkpoints()
        write_json(run.connection, {"attempt": run.attempt(), "variables": INDIRECT, "why": why})
        write_warning(run, warning, step_of(checkpoints[-1]) if checkpoints else 0)
        print(warning.text(), flush=True)


def _values(chosen: Hardware, gpus: str, why: str) -> dict[str, object]:
    """What the sentences about GPUs say."""
    variables = " ".join(f"{name}={value}" for name, value in INDIRECT.items())
    machines = chosen.machines if chosen.machines > 1 else "—"
    return {"gpus": gpus.replace(",", ", "), "machines": machines, "why": why, "variables": variables}


def _apart(chosen: Hardware, why: str) -> Problem:
    """The problem that processes cannot communicate, on CPUs or because their machines do not meet."""
    if chosen.machines == 1:
        return problem("ranks-apart-on-cpu", "hardware.num_processes", count=chosen.num_processes, why=why)
    return problem("machines-apart", "hardware.num_machines", machines=chosen.machines, why=why)


def _limit() -> float:
    """Seconds for an attempt."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        seconds = float(text or LIMIT_SECONDS)
    except ValueError:
        seconds = math.nan
    if 0 < seconds < math.inf:
        return seconds
    print(f"{LIMIT_VARIABLE}={text!r} is not a number of seconds; it is {LIMIT_SECONDS:.0f}.", flush=True)
    return LIMIT_SECONDS


def main() -> NoReturn:
    """Ends without waiting for a process that hangs in the driver and cannot be killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--machine_rank", type=int, default=0)
    parser.add_argument("--main_process_ip", default="127.0.0.1")
    parser.add_argument("--main_process_port", type=int, default=0)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    code = 1
    try:
        with run_lifecycle(arguments.folder) as run:
            check(run, arguments.machine_rank, arguments.main_process_ip, arguments.main_process_port)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
