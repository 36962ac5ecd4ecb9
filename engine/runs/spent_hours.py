"""The GPU hours of deleted runs: they count towards quotas and budgets of sweeps like those of others, so that nobody
gets hours back by deleting what has used them. One file in the saves folder keeps them for as long as they count."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from engine.core.rundir import read_json, write_json
from engine.runs import attempts, index
from engine.runs.run import Run, sweep_of

FILE = ".spent-hours.json"


@dataclass(frozen=True)
class Span:
    """An attempt of a deleted run: whose, from when to when in seconds since 1970, on how many devices, and the ids of
    the run and of its sweep, "" in a file from a version without, and if it belonged to none."""

    user: str
    start: float
    end: float
    devices: int
    run: str = ""
    sweep: str = ""


def note(saves: Path, run: Run, now: float, since: float) -> None:
    """Keep the hours of a run that is about to be deleted, in place of what an earlier try to delete it has kept; those
    from before `since` are dropped, unless other runs of their sweep are left. The caller holds the queue's lock. A
    full disk loses them, since it must not keep anybody from freeing it."""
    sweep = sweep_of(run).get("id", "")
    own = [Span(run.by, *span, run.id, sweep) for span in attempts.spans(run, now)] if run.by or sweep else []
    if own:
        left = {id for other in index.runs(saves) if other.id != run.id and (id := sweep_of(other).get("id"))}
        spans = [*(span for span in _read(saves) if span.run != run.id), *own]
        with contextlib.suppress(OSError):
            write_json(saves / FILE, [astuple(span) for span in spans if span.end > since or span.sweep in left])


def hours(saves: Path, user: str, now: float, since: float, present: Collection[str] = ()) -> float:
    """The GPU hours of a user's deleted runs between `since` and `now`; without those of runs whose ids are in
    `present`: their deletion has failed."""
    spans = (span for span in _read(saves) if span.user == user and span.run not in present)
    return sum(attempts.hours_within((span.start, span.end, span.devices), now, since) for span in spans)


def hours_of_sweep(saves: Path, id: str, present: Collection[str] = ()) -> float:
    """The GPU hours of the deleted runs of a sweep; `present` as for `hours`."""
    spans = (span for span in _read(saves) if span.sweep == id and span.run not in present)
    return sum(span.devices * max(span.end - span.start, 0.0) / 3600 for span in spans)


def _read(saves: Path) -> list[Span]:
    content = read_json(saves / FILE)
    return [span for entry in content if (span := _span(entry))] if isinstance(content, list) else []


def _span(entry: Any) -> Span | None:
    try:
        user, start, end, devices, *ids = entry
        return Span(str(user), float(start), float(end), int(devices), *map(str, ids))
    except (TypeError, ValueError, OverflowError):
        return None
