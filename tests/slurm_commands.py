"""Shell scripts in place of Slurm's commands, for tests of what is asked of it and of what its answers mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.runs import slurm


def stand_in_commands(folder: Path, patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that writes scripts by their commands' names, such as squeue="exit 1". What they are called with is
    appended to the file `calls` in the folder. A job that is submitted is number 7."""
    programs = folder / "bin"
    programs.mkdir()
    patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            text = f'#!/bin/sh\necho $0 "$@" >> {folder}/calls\n{script}\n'
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(0o755)
        slurm.forget()

    write(squeue="", sbatch="echo 7", scancel="", scontrol="")
    return write
