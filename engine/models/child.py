"""Questions about a model that only its classes answer: a child process imports them, prints the answer, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 90  # for the imports, and a model with a hundred layers
MAX_REASON_CHARACTERS = 300
ENVIRONMENT = {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class NoAnswer(Exception):
    """The child failed or took too long; the text says why."""


def ask(module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints. Raises NoAnswer."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        child = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=MAX_SECONDS,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"> {MAX_SECONDS} s") from None
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2][:MAX_REASON_CHARACTERS]
        raise NoAnswer(reason or f"exit code {child.returncode}")
    return child.stdout
