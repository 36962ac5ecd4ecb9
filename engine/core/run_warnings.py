"""warnings.jsonl: problems of a run that continues, stored as codes, to be shown in any language."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from engine.core.problems import Problem, sentences
from engine.core.rundir import RunDir, append_lines, read_lines


@dataclass(frozen=True)
class RunWarning:
    """A warning: the problem, its step, and when it was recorded (seconds since the epoch)."""

    problem: Problem
    step: int
    at: float


def write_warning(run: RunDir, problem: Problem, step: int) -> None:
    """Append a line to warnings.jsonl. If the disk is full, only this warning is lost."""
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
    """The newest warning of each code, oldest first. Damaged lines and unknown codes are left out."""
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
