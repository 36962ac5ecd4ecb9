"""Finds Slurm for the tests of the Slurm engine, or installs Debian's. Its services are not started: there is no
configuration for them, and tests start their own (`tests/slurm_cluster.py`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.debian import apt_get

PACKAGE = "slurm-wlm"
DAEMONS = ("slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")


def program(name: str) -> str | None:
    """Path of one of Slurm's programs. Debian installs the daemons where only root looks."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in (*DAEMONS, *COMMANDS) if not program(name)]


def main() -> int:
    if missing():
        install = ("install", "-y", "-qq", "--no-install-recommends", PACKAGE)
        try:
            try:
                apt_get(*install)
            except subprocess.CalledProcessError:
                apt_get("update", "-qq")  # an image often comes without lists of packages, or with old ones
                apt_get(*install)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"No Slurm, and none could be installed ({error}): tests of the Slurm engine FAIL.", file=sys.stderr)
            return 1
    print(f"tests of the Slurm engine use {program('slurmctld')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
