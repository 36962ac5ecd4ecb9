"""The earlier attempts of a resumed run: how long they took, and from which step the current one continues."""

from __future__ import annotations

from engine.core.regular_files import list_folders
from engine.core.rundir import RunDir, read_object
from engine.runs.run import Run


def seconds_before(run: Run) -> float:
    """How long the earlier attempts took together, from the start of each supervisor to its end; of an attempt that was
    interrupted, to its last report."""
    return sum(_seconds(RunDir(run.dir.attempts / folder.name)) for folder in list_folders(run.dir.attempts))


def _seconds(attempt: RunDir) -> float:
    started = read_object(attempt.keeper).get("started")
    ended = read_object(attempt.exit).get("ended") or read_object(attempt.progress).get("at")
    if isinstance(started, (int, float)) and isinstance(ended, (int, float)):
        return max(ended - started, 0.0)
    return 0.0


def resumed_from(run: Run) -> int | None:
    """The step of the checkpoint from which the current attempt of a training continues, 0 if there was none; None for
    other runs, and for those resumed by a version that did not record it."""
    step = run.request.get("resumed_from")
    return step if isinstance(step, int) and run.kind == "training" else None
