"""What happened to a job, as OpenAI's events, checkpoints and results file: read from the folder of its run."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.api.jobs import Job, id_of
from engine.core.problems import say
from engine.core.run_warnings import read_warnings
from engine.core.rundir import COMPLETE_FILE, read_lines, read_object, stamp, step_of

Level = Literal["info", "warn", "error"]
# Curves in metrics.jsonl → the names of OpenAI. Every validation is over all of its rows.
METRIC_NAMES = {
    "loss": ("train_loss",),
    "mean_token_accuracy": ("train_mean_token_accuracy",),
    "reward": ("train_reward_mean",),
    "eval_loss": ("valid_loss", "full_valid_loss"),
    "eval_mean_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    "eval_reward": ("valid_reward_mean", "full_valid_reward_mean"),
}
CHECKPOINT_METRICS = (
    "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
    "full_valid_loss", "full_valid_mean_token_accuracy",
)  # fmt: skip
CSV_COLUMNS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Event:
    """`key` tells it from the other events of its job; `data` are the metrics of a step."""

    key: tuple[object, ...]
    at: float
    message: str
    level: Level = "info"
    data: Mapping[str, Any] = field(default_factory=dict)

    def id(self, job: Job) -> str:
        return id_of("ftevent-", job.run.id, *self.key)

    def as_object(self, job: Job) -> dict[str, Any]:
        return {
            "object": "fine_tuning.job.event",
            "id": self.id(job),
            "created_at": int(self.at),
            "level": self.level,
            "message": self.message,
            "type": "metrics" if self.data else "message",
            "data": dict(self.data),
        }


def events(job: Job) -> list[Event]:
    """What happened, newest first."""
    happened = [
        *_beginning(job),
        *_metric_events(job),
        *(
            Event(("checkpoint", step), at, say("api-event-checkpoint", step=step))
            for step, at in _checkpoint_times(job)
        ),
        *(
            Event(("warning", warning.problem.code), warning.at, str(warning.problem), "warn")
            for warning in read_warnings(job.run.dir)
        ),
        *_end(job),
    ]
    return sorted(happened, key=lambda event: event.at)[::-1]


def _beginning(job: Job) -> Iterator[Event]:
    run = job.run
    yield Event(("created",), run.submitted, say("api-event-created", id=job.id))
    yield Event(("validating",), run.submitted, say("api-event-validating"))
    if run.started and job.status != "validating_files":
        yield Event(("started", run.request["attempt"]), run.started, say("api-event-started"))


def _end(job: Job) -> Iterator[Event]:
    run, attempt = job.run, job.run.request["attempt"]
    stop = run.request.get("stop") or {}
    at = run.ended or stop.get("at") or time.time()
    if job.fine_tuned_model:
        yield Event(("model",), at, say("api-event-model", name=job.fine_tuned_model))
    if job.status == "succeeded":
        yield Event(("succeeded", attempt), at, say("api-event-succeeded"))
    if job.status == "paused":
        yield Event(("paused", attempt), at, say("api-event-paused"))
    if job.status == "cancelled":
        yield Event(("cancelled", attempt), at, say("api-event-cancelled"))
    if error := job.error:
        yield Event(("failed", attempt), at, error["message"], "error")


def _metric_events(job: Job) -> Iterator[Event]:
    total = read_object(job.run.dir.progress).get("total")
    logged, end = steps(job), job.run.ended or time.time()
    # The file counts the seconds of training, and its last line was the last to be written.
    last = max((seconds for seconds, _ in logged.values()), default=0.0)
    begin = min(_changed(job.run.dir.metrics), end) - last
    for step, (seconds, metrics) in logged.items():
        shown = {"train_loss": "training loss", "train_reward_mean": "reward", "valid_loss": "validation loss"}
        figures = ", ".join(f"{label}={metrics[name]:.4g}" for name, label in shown.items() if name in metrics)
        message = say("api-event-step", step=step, total=total or "?", figures=figures or "—")
        data = {"step": step, "total_steps": total, **metrics}
        yield Event(("step", step), max(begin + seconds, job.run.submitted), message, data=data)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def steps(job: Job) -> Mapping[int, tuple[float, Mapping[str, float]]]:
    """What was logged at each step, in order: seconds since the start, and figures by OpenAI's names or, if it has
    none, ours. A resumed run's later line for a step wins."""
    metrics = job.run.dir.metrics
    return _steps(metrics, stamp([metrics]))


@lru_cache(maxsize=32)  # a client that waits asks every few seconds
def _steps(metrics: Path, _stamp: str) -> dict[int, tuple[float, dict[str, float]]]:
    logged: dict[int, tuple[float, dict[str, float]]] = {}
    for line in read_lines(metrics):
        step, seconds = line.get("step"), line.get("time")
        if isinstance(step, int) and isinstance(seconds, (int, float)):
            figures = dict(logged.get(step, (0.0, {}))[1])
            for name, value in line.items():
                if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value):
                    figures |= dict.fromkeys(METRIC_NAMES.get(name, (name,)), value)
            logged[step] = (seconds, figures)
    return dict(sorted(logged.items()))


def _checkpoint_times(job: Job) -> Iterator[tuple[int, float]]:
    for checkpoint in job.run.dir.checkpoints():
        try:
            yield step_of(checkpoint), (checkpoint / COMPLETE_FILE).stat().st_mtime
        except OSError:  # replaced by a newer one in the meantime
            continue


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its step, and when it was written."""

    step: int
    at: float

    def id(self, job: Job) -> str:
        return id_of("ftckpt_", job.run.id, self.step)

    def as_object(self, job: Job) -> dict[str, Any]:
        """OpenAI's checkpoint object, with the newest figures up to its step."""
        before = [figures for number, (_, figures) in steps(job).items() if number <= self.step]
        figures = {name: value for line in before for name, value in line.items() if name in CHECKPOINT_METRICS}
        return {
            "object": "fine_tuning.job.checkpoint",
            "id": self.id(job),
            "created_at": int(self.at),
            "fine_tuned_model_checkpoint": f"{job.result_name}:ckpt-step-{self.step}",
            "fine_tuning_job_id": job.id,
            "metrics": {"step": self.step, **figures},
            "step_number": self.step,
        }


def checkpoints(job: Job) -> list[Checkpoint]:
    """Newest first."""
    return [Checkpoint(step, at) for step, at in _checkpoint_times(job)][::-1]


def results_csv(job: Job) -> str:
    """The figures of each step as CSV, empty cells for what was not measured."""
    return _as_csv(steps(job))


def results_size(job: Job) -> int:
    """Bytes of that CSV."""
    metrics = job.run.dir.metrics
    return _results_size(metrics, stamp([metrics]))


@lru_cache(maxsize=10_000)  # a list of files has one for each job that has succeeded
def _results_size(metrics: Path, changed: str) -> int:
    return len(_as_csv(_steps(metrics, changed)).encode())


def _as_csv(logged: Mapping[int, tuple[float, Mapping[str, float]]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    others = sorted({name for _, figures in logged.values() for name in figures if not name.startswith("full_")})
    names = [*CSV_COLUMNS, *(name for name in others if name not in CSV_COLUMNS)]
    writer.writerow(["step", *names])
    writer.writerows([step, *(figures.get(name, "") for name in names)] for step, (_, figures) in logged.items())
    return text.getvalue()
