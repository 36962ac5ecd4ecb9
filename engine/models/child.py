"""Questions about a model that only its classes answer: a child process imports them, prints the answer, and ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

PROJECT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 90  # for the imports, and a model with a hundred layers
RETRY_SECONDS = 120  # after a child that took too long: the machine may have been busy
MAX_REASON_CHARACTERS = 300
KEPT = 64  # answers to each question
ENVIRONMENT = {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


Answer = TypeVar("Answer")


class NoAnswer(Exception):
    """The child failed; the text says why."""


class TooSlow(NoAnswer):
    """It was ended after MAX_SECONDS."""


def ask(module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints. Raises NoAnswer, and in particular TooSlow."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        child = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=MAX_SECONDS,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TooSlow(f"> {MAX_SECONDS} s") from None
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2][:MAX_REASON_CHARACTERS]
        raise NoAnswer(reason or f"exit code {child.returncode}")
    return child.stdout


def remembered(question: Callable[..., Answer]) -> Callable[..., Answer]:
    """The question with its answers remembered by their arguments; TooSlow is raised again without a child until
    RETRY_SECONDS have passed, and is no answer for good."""
    known = lru_cache(maxsize=KEPT)(question)
    slow: dict[tuple[object, ...], float] = {}

    def answer(*arguments: object) -> Answer:
        if time.monotonic() - slow.get(arguments, -math.inf) < RETRY_SECONDS:
            raise TooSlow(f"> {MAX_SECONDS} s")
        try:
            return known(*arguments)
        except TooSlow:
            if len(slow) >= KEPT:
                slow.clear()
            slow[arguments] = time.monotonic()
            raise

    return answer
