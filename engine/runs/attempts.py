"""The attempts of a run: their files, when each took place, on how many devices, and from which step the current one
continues."""

from __future__ import annotations

from pathlib import Path

from engine.core.problems import Refusal
from engine.core.regular_files import list_folders
from engine.core.rundir import RunDir, read_object
from engine.runs.run import Run


def put_aside(run: RunDir, number: int, *others: Path) -> None:
    """Move the files of attempt `number` to their place among the earlier ones, `others` last."""
    past = run.attempts / str(number)
    past.mkdir(parents=True, exist_ok=True)
    for file in (run.error, run.progress, run.keeper, run.pause, *others):
        if file.exists():
            file.rename(past / file.name)


def seconds_before(run: Run) -> float:
    """How long the earlier attempts took together, from the start of each supervisor to its end; of an attempt that was
    interrupted, to its last report."""
    return sum(end - start for start, end in _earlier(run))


def spans(run: Run, now: float) -> list[tuple[float, float]]:
    """When each attempt began and ended, the current one until `now` if it has not; in seconds since 1970."""
    current = [(run.started, max(_end(run, now), run.started))] if run.started else []
    return [*_earlier(run), *current]


def _earlier(run: Run) -> list[tuple[float, float]]:
    attempts = (_span(RunDir(run.dir.attempts / folder.name)) for folder in list_folders(run.dir.attempts))
    return [span for span in attempts if span]


def _span(attempt: RunDir) -> tuple[float, float] | None:
    started = read_object(attempt.keeper).get("started")
    ended = read_object(attempt.exit).get("ended") or read_object(attempt.progress).get("at")
    if isinstance(started, (int, float)) and isinstance(ended, (int, float)):
        return started, max(ended, started)
    return None


def _end(run: Run, now: float) -> float:
    """When the attempt ended; if it was interrupted, when it last reported progress."""
    if run.ended:
        return run.ended
    if run.state != "interrupted":
        return now
    reported = read_object(run.dir.progress).get("at")
    return reported if isinstance(reported, (int, float)) else run.started or now


def devices(run: Run) -> int:
    """The number of GPUs that the run uses or used; on the CPU, of its processes."""
    if leased := read_object(run.dir.keeper).get("leases"):
        return len(leased)
    try:
        return run.spec.hardware.num_processes
    except (Refusal, AttributeError):  # evaluations and exports have one process
        return 1


def resumed_from(run: Run) -> int | None:
    """The step of the checkpoint from which the current attempt of a training continues, 0 if there was none; None for
    other runs, and for those resumed by a version that did not record it."""
    step = read_object(run.dir.keeper).get("resumed_from", run.request.get("resumed_from"))
    return step if isinstance(step, int) and run.kind == "training" else None
