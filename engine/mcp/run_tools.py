"""The tools about runs: which there are, how one is going, its output, several compared; start, stop and resume."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from engine.core.problems import Problem, Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import end_of
from engine.mcp.call import READ, WRITE, Arguments, Call, OfRun, Tool
from engine.runs import compare, engines, evaluations, failures, kinds, progress, results, runs
from engine.runs.run import Run

LOG_BYTES = 256 << 10  # at the end of a log, in which its last lines are searched
MAX_LINES = 1000
MAX_RUNS = 200
State = Literal["queued", "preparing", "running", "stopping", "finished", "stopped", "failed", "interrupted"]


class Listing(Arguments):
    """Which runs to list."""

    kind: Literal["training", "evaluation", "export"] | None = Field(None, description="only runs of this kind")
    state: State | None = Field(None, description="only runs in this state")
    text: str = Field("", description="only runs with all of these words in ID, name, base model, data sets or owner")
    limit: int = Field(20, ge=1, le=MAX_RUNS, description="how many of the newest")


class OfLog(OfRun):
    """How much of a log to return."""

    lines: int = Field(50, ge=1, le=MAX_LINES, description="how many of the last lines")


class Several(Arguments):
    """The runs to compare."""

    runs: list[str] = Field(min_length=2, max_length=20, description="trainings, by ID or name")


class OfSpec(Arguments):
    """What to run."""

    spec: str = Field(
        description="the YAML of a training, an evaluation or an export; settings that are left out have their defaults"
    )


class OfWhole(Arguments):
    """The run that a tool changes."""

    run: str = Field(description="a run's ID, or its name, in full")


class Stopping(OfWhole):
    """How to stop a run."""

    kill: bool = Field(False, description="end its processes without saving a checkpoint")


def list_runs(call: Call, arguments: Listing) -> dict[str, Any]:
    """The runs of this studio, newest first: trainings, evaluations and exports, with their state, who submitted them,
    and the newest value of their main curve."""
    words = arguments.text.casefold().split()
    fitting = [
        run
        for run in runs.find(call.workplace.saves, *filter(None, [arguments.kind]))
        if arguments.state in (None, run.state) and all(word in _searched(run) for word in words)
    ]
    return {"runs": [_brief(run) for run in fitting[: arguments.limit]], "total": len(fitting)}


def _searched(run: Run) -> str:
    return " ".join((run.id, run.title, run.facts.base, run.by, *run.facts.data)).casefold()


def show_run(call: Call, arguments: OfRun) -> dict[str, Any]:
    """One run in full: state and progress, the newest value of each curve, why it waits or has failed and what to do,
    its warnings, the findings of an evaluation, the stages that can follow, and its spec as YAML."""
    run = call.run(arguments.run)
    now, why, place = progress.progress(run), failures.explain(run), engines.place(run)
    latest = {name: _last(series.value) for name, series in progress.curves(run).items()}
    result = results.result_of(run)
    return _brief(run) | {
        "ended": _moment(run.ended),
        "progress": {
            "phase": now.phase,
            "done": now.done,
            "total": now.total,
            "unit": now.unit,
            "fraction": now.fraction,
            "eta_seconds": now.eta_s,
            "tokens_per_second": now.tokens_per_s,
        },
        "latest": {name: value for name, value in latest.items() if value is not None},
        "waits_because": place.decision.text(call.language) if place and place.decision.reason else None,
        "failure": why and {"what": why.what(call.language), "what_to_do": why.advice(call.language)},
        "warnings": [warning.problem.text(call.language) for warning in read_warnings(run.dir)],
        "findings": evaluations.findings(run, call.language),
        "result": str(result.folder) if result else None,
        "can": sorted(run.can),
        "next_stages": results.possible_next_stages(run),
        "spec": _spec(run),
    }


def _spec(run: Run) -> str | None:
    """Its YAML; None if it is damaged."""
    try:
        return run.spec.to_yaml(brief=True)
    except Refusal:
        return None


def run_log(call: Call, arguments: OfLog) -> dict[str, Any]:
    """The last lines that the processes of a run have printed; of several machines, those of the first, and those of
    the others by the names of their logs."""
    run = call.run(arguments.run)
    lines = {log.name: _last_lines(log, arguments.lines) for log in run.dir.logs()}
    answer = {"run": run.id, "lines": lines.pop(run.dir.log.name)}
    return {**answer, "other_machines": lines} if lines else answer


def _last_lines(log: Path, count: int) -> list[str]:
    text = end_of(log, LOG_BYTES).decode("utf-8", "replace")
    # A bar of progress is one line, of which only the last state is of interest.
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.splitlines()][-count:]


def compare_runs(call: Call, arguments: Several) -> dict[str, Any]:
    """Several trainings side by side: the settings in which they differ, and their final figures; "best" are the runs
    with the best value, where better is known."""
    chosen = list({run.id: run for run in map(call.run, arguments.runs)}.values())
    specs = [compare.spec_of(run) for run in chosen]
    ids = [run.id for run in chosen]
    return {
        "runs": [_brief(run) for run in chosen],
        "differences": [
            {"setting": difference.path, "values": dict(zip(ids, map(_value, difference.values), strict=True))}
            for difference in compare.differences(specs)
        ],
        "figures": [
            {
                "name": figure.name,
                "of": figure.of,
                "values": dict(zip(ids, map(_finite, figure.values), strict=True)),
                "best": [ids[place] for place in sorted(figure.best)],
            }
            for figure in compare.figures(chosen, compare.curves(chosen))
        ],
    }


def check_spec(call: Call, arguments: OfSpec) -> dict[str, Any]:
    """Everything that prevents a spec from running here, each with the smallest fix, and warnings; nothing is
    started."""
    checked = kinds.check(arguments.spec, call.workplace)
    return {
        "ready": not checked.problems,
        "problems": [as_object(issue, call.language) for issue in checked.problems],
        "warnings": [as_object(issue, call.language) for issue in checked.doubts],
    }


def start_run(call: Call, arguments: OfSpec) -> dict[str, Any]:
    """Submit a spec to the queue, where it starts as soon as a GPU is free. It belongs to the user."""
    spec = kinds.read(arguments.spec)
    with call.acting("start", f"{spec.kind} {spec.name}".strip()):
        return _brief(runs.submit(spec, call.workplace, by=call.caller.name))


def stop_run(call: Call, arguments: Stopping) -> dict[str, Any]:
    """Stop a run after it has saved a checkpoint, from which it can be resumed; or end it at once. A run that waits
    leaves the queue."""
    run = call.run(arguments.run, lambda run: "kill" in run.can, whole=True)
    # A waiting run has nothing to save.
    how = "kill" if arguments.kill or run.state == "queued" else "save"
    with call.acting("kill" if how == "kill" else "stop", run.id, run.by):
        runs.stop(run, how, by=call.caller.name)
    return _brief(call.run(run.id))


def resume_run(call: Call, arguments: OfWhole) -> dict[str, Any]:
    """Queue a stopped, failed or interrupted run again; it continues from its newest checkpoint."""
    run = call.run(arguments.run, lambda run: "resume" in run.can, whole=True)
    with call.acting("resume", run.id, run.by):
        runs.resume(run, by=call.caller.name, data=call.workplace.data)
    return _brief(call.run(run.id))


def as_object(issue: Problem, language: str) -> dict[str, str]:
    """A problem as JSON: the setting that it is about, its code, and its sentence."""
    return {"setting": issue.field, "code": issue.code, "text": issue.text(language)}


def _brief(run: Run) -> dict[str, Any]:
    facts = run.facts
    value = {progress.headline_curve(run): facts.headline} if facts.headline is not None else {}
    return {
        "id": run.id,
        "name": run.title,
        "kind": run.kind,
        "state": run.state,
        "stage": facts.stage,
        "method": facts.method,
        "base": facts.base,
        "data": list(facts.data),
        "by": run.by,
        "submitted": _moment(run.submitted),
        "value": value,
    }


def _moment(at: float | None) -> str | None:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at)) if at is not None else None


def _last(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _value(value: Any) -> Any:
    return None if value is compare.ABSENT else value


TOOLS = {
    "list_runs": Tool(list_runs, Listing, READ, reads=True),
    "show_run": Tool(show_run, OfRun, READ, reads=True),
    "run_log": Tool(run_log, OfLog, READ, reads=True),
    "compare_runs": Tool(compare_runs, Several, READ, reads=True),
    "check_spec": Tool(check_spec, OfSpec, READ, reads=True),
    "start_run": Tool(start_run, OfSpec, WRITE),
    "stop_run": Tool(stop_run, Stopping, WRITE, destroys=True),
    "resume_run": Tool(resume_run, OfWhole, WRITE),
}
