"""A program of a run on one of its machines: `python -m engine.launch.machine FOLDER ADDRESS -- COMMAND …`.

Slurm's srun starts it once per machine. It becomes the command, which is told which of the machines this is and where
the first one listens; its output goes to a log of its own, straight to the file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from engine.core import hardware, regular_files
from engine.core.problems import Problem, Refusal, problem
from engine.core.run_errors import write_error
from engine.core.rundir import RunDir

SCRIPT_FLAG = "--module"  # before it are the launcher's own flags


def machine_command(command: list[str], machine: int, address: str) -> list[str]:
    """The command for a machine; of a flag that occurs twice, the later one counts."""
    at = command.index(SCRIPT_FLAG) if SCRIPT_FLAG in command else len(command) - 1
    flags = ["--machine_rank", str(machine), "--main_process_ip", address]
    return [*command[:at], *flags, *command[at:]]


def missing_gpus(count: int, code: str = "job-without-gpus", field: str = "hardware.device") -> Problem | None:
    """The problem that a job has fewer GPUs on this machine than it was submitted for."""
    there = len(hardware.gpus()) if count else 0
    if there >= count:
        return None
    machine = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    values = {"count": count, "there": there, "machine": machine}
    return hardware.gpu_failure() or problem(code, field, **values)


def main() -> None:
    folder, address, _, *command = sys.argv[1:]
    run, machine = RunDir(Path(folder)), int(os.environ["SLURM_NODEID"])
    log = regular_files.append_to_regular(run.log_of(machine))
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    count = int(os.environ[hardware.GPUS_VARIABLE])
    if not count:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which Slurm deletes, so that GPUs of others would be seen
    try:
        if missing := missing_gpus(count):
            raise Refusal(missing)
    except Refusal as refusal:
        print(refusal, flush=True)
        with contextlib.suppress(OSError):  # another machine has written one, or the disk is full
            write_error(run, refusal)
        sys.exit(1)
    os.execv(command[0], machine_command(command, machine, address))


if __name__ == "__main__":
    main()
