"""The GPU hours of deleted runs: they count towards quotas like those of others, so that nobody gets hours back by
deleting what has used them. One file in the saves folder keeps them for as long as they count."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from engine.core.rundir import read_json, write_json
from engine.runs import attempts
from engine.runs.run import Run

FILE = ".spent-hours.json"
Span = tuple[str, float, float, int]  # whose, from when to when (seconds since 1970), on how many devices


def note(saves: Path, run: Run, now: float, since: float) -> None:
    """Keep the hours of a run that is about to be deleted; those from before `since` are dropped. The caller holds the
    queue's lock. A full disk loses them, since it must not keep anybody from freeing it."""
    own = [(run.by, *span) for span in attempts.spans(run, now)] if run.by else []
    if own:
        kept = [span for span in [*_read(saves), *own] if span[2] > since]
        with contextlib.suppress(OSError):
            write_json(saves / FILE, kept)


def hours(saves: Path, user: str, now: float, since: float) -> float:
    """The GPU hours of a user's deleted runs between `since` and `now`."""
    return sum(attempts.hours_within(span[1:], now, since) for span in _read(saves) if span[0] == user)


def _read(saves: Path) -> list[Span]:
    content = read_json(saves / FILE)
    return [span for entry in content if (span := _span(entry))] if isinstance(content, list) else []


def _span(entry: Any) -> Span | None:
    try:
        user, start, end, devices = entry
        return str(user), float(start), float(end), int(devices)
    except (TypeError, ValueError, OverflowError):
        return None
