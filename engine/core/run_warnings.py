"""warnings.jsonl: what is wrong with a run that goes on nevertheless, as codes,
so that it can be told in any language."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from engine.core.problems import Problem, sentences
from engine.core.rundir import RunDir, append_lines, read_lines


@dataclass(frozen=True)
class RunWarning:
    """What is wrong, at which step, and when it was noted (seconds since the epoch)."""

    problem: Problem
    step: int
    at: float


def write_warning(run: RunDir, problem: Problem, step: int) -> None:
    """Add a line to warnings.jsonl. A full disk loses it and no more."""
    values = {name: str(value) for name, value in problem.values.items()}
    record = {
        "at": time.time(),
        "step": step,
        "code": problem.code,
        "field": problem.field,
        "values": values,
    }
    with contextlib.suppress(OSError):
        append_lines(run.warnings, [record])


def read_warnings(run: RunDir) -> list[RunWarning]:
    """The newest warning of each code, oldest first; a line that is spoiled, or
    of a code that is not known here, is left out."""
    newest: dict[str, RunWarning] = {}
    for line in read_lines(run.warnings):
        if (warning := _read(line)) and warning.problem.code in sentences():
            newest.pop(warning.problem.code, None)
            newest[warning.problem.code] = warning
    return list(newest.values())


def _read(line: dict) -> RunWarning | None:
    try:
        problem = Problem(line["code"], line["field"], dict(line["values"]))
        return RunWarning(problem, int(line["step"]), float(line["at"]))
    except (KeyError, TypeError, ValueError):
        return None
