"""The launch of a training on one of several machines: `python -m engine.launch.machine FOLDER ADDRESS -- COMMAND …`.

Slurm's srun starts it once per machine. It becomes the command, which is `engine.worker.launch`, told which of the
machines this is and where the first one listens; its output goes to a log of its own, straight to the file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.core import regular_files
from engine.core.rundir import RunDir

SCRIPT_FLAG = "--module"  # before it are the launcher's own flags


def log_of(run: RunDir, machine: int) -> Path:
    """The log of a machine; that of the first (0) is the run's."""
    return run.log if machine == 0 else run.log.with_name(f"log-{machine + 1}.txt")


def machine_command(command: list[str], machine: int, address: str) -> list[str]:
    """The command for a machine; of a flag that is given twice, the later one counts."""
    at = command.index(SCRIPT_FLAG)
    flags = ["--machine_rank", str(machine), "--main_process_ip", address]
    return [*command[:at], *flags, *command[at:]]


def main() -> None:
    folder, address, _, *command = sys.argv[1:]
    machine = int(os.environ["SLURM_NODEID"])
    log = regular_files.append_to_regular(log_of(RunDir(Path(folder)), machine))
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    os.execv(command[0], machine_command(command, machine, address))


if __name__ == "__main__":
    main()
