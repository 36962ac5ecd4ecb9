"""metrics.jsonl read from its end: what was logged at the newest steps, and not more of the file than is asked for.

Lines of a step stand together, and their `time`, the seconds of training, rises. A run that was resumed logs the steps
since its checkpoint again; then the later lines of a step count.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from engine.core.regular_files import open_regular

BLOCK_BYTES = 1 << 14


@dataclass(frozen=True)
class Logged:
    """What was logged at a step: seconds from the start of training to its first line, finite numbers by the names of
    their curves, and where that line begins in the file."""

    step: int
    seconds: float
    figures: dict[str, float]
    begins: int


def logged_before(metrics: Path, end: int | None = None, below: float = math.inf) -> Iterator[Logged]:
    """The steps in the first `end` bytes (None: all) that are less than `below`, newest first. Nothing if there is no
    such file; lines damaged by a kill are left out."""
    try:
        file = open_regular(metrics)
    except OSError:
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        newest: Logged | None = None
        for begins, line in _lines_backwards(file, size if end is None else min(end, size)):
            read = _read(line, begins)
            if read is None:
                continue
            if newest and read.step == newest.step:
                newest = replace(read, figures={**read.figures, **newest.figures})
            elif read.step < (newest.step if newest else below):
                if newest:
                    yield newest
                newest = read
        if newest:
            yield newest


def logged_at(metrics: Path, begins: int) -> Logged | None:
    """The first line of a step that begins at this byte; None if no line does."""
    try:
        with open_regular(metrics) as file:
            file.seek(max(begins - 1, 0))
            if begins and file.read(1) != b"\n":
                return None
            return _read(file.readline(), begins)
    except OSError:
        return None


def first_byte_at(metrics: Path, seconds: float) -> int:
    """Where the steps begin that were logged `seconds` after the start of training or later; the size of the file if
    there are none."""
    try:
        with open_regular(metrics) as file:
            low, high = 0, file.seek(0, os.SEEK_END)
            while high - low > BLOCK_BYTES:  # lines before `low` are earlier, those from `high` on are not
                middle = (low + high) // 2
                file.seek(middle)
                file.readline()
                begins, read = _next(file)
                if read is None or begins >= high:
                    break
                low, high = (begins, high) if read.seconds < seconds else (low, begins)
            file.seek(low)
            step = None
            while True:
                begins, read = _next(file)
                if read is None or (read.seconds >= seconds and read.step != step):
                    return begins
                step = read.step
    except OSError:
        return 0


def _next(file: IO[bytes]) -> tuple[int, Logged | None]:
    """The next line that can be read, and where it begins; the end of the file without one."""
    while True:
        begins, line = file.tell(), file.readline()
        read = _read(line, begins)
        if read or not line:
            return begins, read


def _lines_backwards(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line, from the last of the first `end` bytes on."""
    rest, at = b"", end
    while at > 0:
        size = min(BLOCK_BYTES, at)
        at -= size
        file.seek(at)
        first, *lines = (file.read(size) + rest).split(b"\n")
        begins = at + len(first) + 1 + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            begins -= len(line) + 1
            yield begins, line
        rest = first
    if rest:
        yield 0, rest


def _read(line: bytes, begins: int) -> Logged | None:
    try:
        content: Any = json.loads(line)
        step, seconds = content["step"], content["time"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(step, int) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return None
    numbers = {name: value for name, value in content.items() if name not in ("step", "time") and _is_number(value)}
    return Logged(step, seconds, numbers, begins)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
