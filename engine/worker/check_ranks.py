"""Try whether the processes of a training can communicate, on the devices that it has: `python -m
engine.worker.check_ranks FOLDER`.

It runs while the rows are being prepared, and the training begins after it. Of several machines, it tries the first. If
the processes cannot communicate, they try it once more without direct connections between GPUs. If that works, the
training goes on in this way, and connection.json in the folder of the run says so.
"""

from __future__ import annotations

import math
import os
import sys
from typing import NoReturn

from engine.core.problems import Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import RunDir, step_of, write_json
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.all_reduce import INDIRECT, all_reduce_failure
from engine.worker.runtime.process_lifecycle import run_lifecycle

LIMIT_VARIABLE, LIMIT_SECONDS = "ATHANOR_RANKS_SECONDS", 60.0


def check(run: RunDir) -> None:
    """Raises Refusal if the processes cannot communicate."""
    run.connection.unlink(missing_ok=True)  # of an earlier attempt
    import torch  # noqa: F401  # once for all that are forked

    count = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8")).hardware.processes_per_machine
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    backend = "gloo" if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else "nccl"
    limit = _limit()
    why = all_reduce_failure(count, backend, limit, {}, fork=True)
    if not why:
        return
    if not gpus:
        raise Refusal(problem("ranks-apart-on-cpu", "hardware.num_processes", count=count, why=why))
    variables = " ".join(f"{name}={value}" for name, value in INDIRECT.items())
    values = {"gpus": gpus.replace(",", ", "), "why": why, "variables": variables}
    print(problem("ranks-again", "hardware.devices", **values).text(), flush=True)
    if still := all_reduce_failure(count, backend, limit, INDIRECT, fork=True):
        raise Refusal(problem("ranks-apart", "hardware.devices", **values, still=still))
    warning = problem("ranks-indirect", "hardware.devices", **values)
    checkpoints = run.checkpoints()
    write_json(run.connection, {"attempt": run.attempt(), "variables": INDIRECT, "why": why})
    write_warning(run, warning, step_of(checkpoints[-1]) if checkpoints else 0)
    print(warning.text(), flush=True)


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
    code = 1
    try:
        with run_lifecycle(sys.argv[1]) as run:
            check(run)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
