"""What has happened to a run that its owner may want to hear of, derived from its folder: it has ended, has stalled,
waits for disk space, or has waited for its turn for too long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.core.run_warnings import RunWarning, read_warnings
from engine.core.rundir import WAITING_FOR_SPACE, read_object
from engine.runs.outcome import disk_is_full
from engine.runs.run import ALIVE_STATES, Run

# State → the event that it is, a name of `engine.notifications.subscriptions.EVENTS`.
ENDS = {"finished": "finished", "failed": "failed", "interrupted": "failed", "stopped": "stopped"}
STALLED = "run-stalled"  # the code of the warning
Covered = tuple[tuple[Run, tuple[str, ...]], ...]  # runs, and keys of occurrences of theirs


@dataclass(frozen=True)
class Occurrence:
    """`key` is different for each occurrence of a run, and stays the same; `at`: seconds since the epoch."""

    run: Run
    event: str
    key: str
    at: float
    sweep: tuple[Run, ...] = ()  # of the end of a sweep: all its runs, of which `run` was the last
    # In a sweep: what is no news to whoever hears of this. Otherwise, once this run has been deleted, the end of
    # another would be the last one, or the first failure, and be sent as well.
    covers: Covered = ()


def occurrences(run: Run, wait_hours: float, now: float, sweep: Sequence[Run] = ()) -> list[Occurrence]:
    """What has happened to a run as it is now; to one of another program, nothing here. `wait_hours`: in the queue,
    from which on that is an event; `sweep`: all runs of its sweep. Of a sweep, only the first failure and the end of
    all runs count, so that nobody gets a message for each."""
    if run.request.get("imported"):
        return []
    ends = _end_in_sweep(run, sweep) if len(sweep) > 1 else _end(run)
    return [*ends, *_stall(run), *_wait_for_space(run, now), *_wait_for_turn(run, wait_hours, now)]


def _end(run: Run) -> Iterator[Occurrence]:
    if run.final and (at := run.ended or _last_sign(run)):  # of a damaged one, nobody knows when it ended
        yield Occurrence(run, ENDS[run.state], _key(run, "ended"), at)


def _end_in_sweep(run: Run, sweep: Sequence[Run]) -> Iterator[Occurrence]:
    [*own] = _end(run)
    if not own:
        return
    others = [other for other in sweep if other.id != run.id]
    ends = {other.id: (_ended_at(other), other.id) for other in sweep if other.final}
    if len(ends) == len(sweep) and ends[run.id] == max(ends.values()):
        events = {ENDS[other.state] for other in sweep}
        event = next(event for event in ("failed", "finished", "stopped") if event in events)
        covers = _covers(run, others, ("ended", "sweep-failed"), ("ended", "sweep-failed", "sweep-ended"))
        yield replace(own[0], event=event, key=_key(run, "sweep-ended"), sweep=tuple(sweep), covers=covers)
    elif own[0].event == "failed":
        failed = [ends[other.id] for other in sweep if other.final and ENDS[other.state] == "failed"]
        if ends[run.id] == min(failed):
            covers = _covers(run, others, ("ended",), ("sweep-failed",))
            yield replace(own[0], key=_key(run, "sweep-failed"), covers=covers)


def _covers(run: Run, others: Sequence[Run], of_run: Sequence[str], of_others: Sequence[str]) -> Covered:
    """The keys of these ends, for the run and for the others of its sweep."""
    ends = [(run, of_run), *((other, of_others) for other in others)]
    return tuple((each, tuple(_key(each, end) for end in names)) for each, names in ends)


def _key(run: Run, end: str) -> str:
    return f"{_attempt(run)}-{end}"


def _ended_at(run: Run) -> float:
    return run.ended or _last_sign(run) or 0.0


def _last_sign(run: Run) -> float | None:
    """When an interrupted run was last known to be alive."""
    if run.state != "interrupted":
        return None
    return _number(read_object(run.dir.progress).get("at")) or _number(run.started)


def _stall(run: Run) -> Iterator[Occurrence]:
    warning = newest_stall(run) if run.state in ALIVE_STATES else None
    if warning:
        yield Occurrence(run, "stalled", f"stalled-{warning.at:.3f}", warning.at)


def newest_stall(run: Run) -> RunWarning | None:
    """The last time that the training has stalled."""
    return next((warning for warning in read_warnings(run.dir) if warning.problem.code == STALLED), None)


def _wait_for_space(run: Run, now: float) -> Iterator[Occurrence]:
    if run.state == "queued" and not run.request.get("held") and disk_is_full(run.dir):
        yield Occurrence(run, "space", f"{_attempt(run)}-space", now)
    elif run.state in ALIVE_STATES:
        reported = read_object(run.dir.progress)
        if reported.get("phase") == WAITING_FOR_SPACE:
            yield Occurrence(run, "space", f"{_attempt(run)}-space-{reported.get('done')}", now)


def _wait_for_turn(run: Run, wait_hours: float, now: float) -> Iterator[Occurrence]:
    """Not of a run on hold: somebody wants it to wait."""
    if run.state == "queued" and not run.request.get("held") and (since := waits_since(run)):
        at = since + wait_hours * 3600
        if at <= now:
            yield Occurrence(run, "turn", f"{_attempt(run)}-turn", at)


def waits_since(run: Run) -> float | None:
    """When a waiting run was submitted or resumed: its place in the queue says something else once it has been
    moved."""
    before = run.dir.attempts / str(_attempt(run) - 1)  # the resume has put the files of the last attempt there
    with contextlib.suppress(OSError):
        return before.stat().st_mtime
    return _number(run.submitted)


def _attempt(run: Run) -> int:
    attempt = (run.exit or run.request).get("attempt")
    return attempt if isinstance(attempt, int) else 1


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
