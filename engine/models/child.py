"""Ask a child process that imports what this process does not, prints its answer, and ends: for example what only the
classes of a model know."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
    """The child failed; the text says why, and `output` is what it has printed."""

    def __init__(self, reason: str, output: str = ""):
        super().__init__(reason)
        self.output = output


class TooSlow(NoAnswer):
    """It was ended after the time that it had."""


def ask(
    module: str, *arguments: str, seconds: float | None = None, environment: Mapping[str, str] = ENVIRONMENT
) -> str:
    """What `python -m module arguments` prints within `seconds`, by default MAX_SECONDS. Raises NoAnswer, and in
    particular TooSlow."""
    command, seconds = [sys.executable, "-m", module, *arguments], seconds or MAX_SECONDS
    try:
        child = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=seconds,
            env=os.environ | environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TooSlow(f"> {seconds:g} s") from None
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2][:MAX_REASON_CHARACTERS]
        raise NoAnswer(reason or f"exit code {child.returncode}", child.stdout)
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
