"""The attempts of a run: their files, when each took place, on how many devices, and from which step the current one
continues."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from engine.core.problems import Refusal
from engine.core.regular_files import list_folders
from engine.core.rundir import RunDir, read_object
from engine.runs.run import ALIVE_STATES, Run


def put_aside(run: RunDir, number: int, *others: Path) -> None:
    """Move the files of attempt `number` to their place among the earlier ones, `others` last. The one that says whose
    they are comes after them, so that this can be repeated if it was interrupted."""
    past = run.attempts / str(number)
    past.mkdir(parents=True, exist_ok=True)
    for file in (run.error, run.progress, run.pause, run.keeper, *others):
        if file.exists():
            file.rename(past / file.name)


def ended_number(run: RunDir) -> int:
    """The number of the attempt whose files are in the folder of a run that has ended. The request may be ahead of it,
    if whoever resumed the run was killed before the files were put aside."""
    written = (read_object(file).get("attempt") for file in (run.exit, run.keeper))
    return next((number for number in written if isinstance(number, int) and number > 0), run.attempt())


def decided_precision(run: RunDir) -> str:
    """What the precision "auto" means in a training that goes on from a checkpoint: what it meant before, whatever the
    GPUs of this attempt are. "" if there is no checkpoint, or that is unknown."""
    if not run.checkpoints():
        return ""
    folders = sorted((folder.name for folder in list_folders(run.attempts) if folder.name.isdecimal()), key=int)
    past = (RunDir(run.attempts / name) for name in reversed(folders))
    keepers = (read_object(attempt.keeper) for attempt in (run, *past))
    return next((keeper["precision"] for keeper in keepers if keeper.get("precision")), "")


def seconds_before(run: Run) -> float:
    """How long the earlier attempts took together, from the start of each supervisor to its end; of an attempt that was
    interrupted, to its last report."""
    return sum(end - start for _, start, end in _earlier(run))


def gpu_hours(run: Run, now: float, since: float = -math.inf) -> float:
    """The GPU hours of all attempts between `since` and `now`, in seconds since 1970; each with the devices that it had
    itself. On the CPU, a process counts as a GPU."""
    return sum(hours_within(span, now, since) for span in spans(run, now))


def spans(run: Run, now: float) -> list[tuple[float, float, int]]:
    """Each attempt until `now`: when it began and ended, and on how many devices."""
    return [(start, end, _devices(run, attempt)) for attempt, start, end in [*_earlier(run), *_current(run, now)]]


def hours_within(span: tuple[float, float, int], now: float, since: float) -> float:
    """The GPU hours of an attempt between `since` and `now`."""
    start, end, devices = span
    return devices * max(min(end, now) - max(start, since), 0.0) / 3600


def _earlier(run: Run) -> list[tuple[RunDir, float, float]]:
    """The files of each earlier attempt, and when it began and ended; without those that have left too little."""
    attempts = (RunDir(run.dir.attempts / folder.name) for folder in list_folders(run.dir.attempts))
    return [(attempt, *span) for attempt in attempts if (span := _span(attempt))]


def _current(run: Run, now: float) -> list[tuple[RunDir, float, float]]:
    """The same of the current one, if it has begun; it lasts until `now` if it is alive."""
    return [(run.dir, run.started, max(_end(run, now), run.started))] if run.started else []


def _span(attempt: RunDir) -> tuple[float, float] | None:
    started = read_object(attempt.keeper).get("started")
    ended = read_object(attempt.exit).get("ended") or read_object(attempt.progress).get("at")
    if isinstance(started, (int, float)) and isinstance(ended, (int, float)):
        return started, max(ended, started)
    return None


def _end(run: Run, now: float) -> float:
    """When the attempt ended; if it was interrupted, or is to be started again, when it last reported progress."""
    if run.ended:
        return run.ended
    if run.state in ALIVE_STATES:
        return now
    reported = read_object(run.dir.progress).get("at")
    return reported if isinstance(reported, (int, float)) else run.started or now


def _devices(run: Run, attempt: RunDir) -> int:
    """The number of GPUs that an attempt uses or used; on the CPU, of its processes."""
    if leased := read_object(attempt.keeper).get("leases"):
        return len(leased)
    try:
        return _with_spec_of(run, attempt).spec.hardware.num_processes
    except Refusal:
        return 1


def _with_spec_of(run: Run, attempt: RunDir) -> Run:
    """The run as its spec was in an attempt: an attempt keeps it if the next one has another (`resumption`)."""
    if attempt.path == run.path:
        return run
    kept = {int(name): run.dir.attempts / name for name in _numbers(run) if int(name) >= int(attempt.path.name)}
    folders = (folder for _, folder in sorted(kept.items()) if RunDir(folder).spec.exists())
    return replace(run, path=next(folders, run.path))


def _numbers(run: Run) -> list[str]:
    return [folder.name for folder in list_folders(run.dir.attempts) if folder.name.isdecimal()]


def resumed_from(run: Run) -> int | None:
    """The step of the checkpoint from which the current attempt of a training continues, 0 if there was none; None for
    other runs, and for those resumed by a version that did not record it."""
    step = read_object(run.dir.keeper).get("resumed_from", run.request.get("resumed_from"))
    return step if isinstance(step, int) and run.kind == "training" else None
