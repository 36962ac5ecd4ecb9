"""What happened to a job, as OpenAI's events, checkpoints and results file: read from the folder of its run."""

from __future__ import annotations

import csv
import io
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import merge
from pathlib import Path
from typing import Any, Literal

from engine.api.errors import ApiError
from engine.api.jobs import CHECKPOINT_MARK, Job, id_of
from engine.api.step_log import Logged, first_byte_at, logged_at, logged_before
from engine.core.problems import problem, say
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


# Of events at the same moment, which is the newest.
FIRST, STEP, LATER = 0, 1, 2
STEP_ID = re.compile(r"ftevent-[0-9a-f]{24}-([0-9a-f]{1,12})")


@dataclass(frozen=True)
class Event:
    """`key` tells it from the other events of its job; `data` are the metrics of a step, and `begins` is where they
    begin in metrics.jsonl."""

    key: tuple[object, ...]
    at: float
    message: str
    level: Level = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    rank: int = LATER
    begins: int | None = None

    @property
    def place(self) -> tuple[float, int]:
        """Its place among the others: a later event has a larger one."""
        return self.at, self.rank

    def id(self, job: Job) -> str:
        id = id_of("ftevent-", job.run.id, *self.key)
        return id if self.begins is None else f"{id}-{self.begins:x}"

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


def events(job: Job, after: str = "") -> Iterator[Event]:
    """What happened, newest first; `after`: only what is older than the event with this id. Of the steps, no more is
    read than the caller takes. Raises ApiError if there is no such event."""
    log, others = _StepEvents(job), _other_events(job)
    if not after:
        return merge(others, log.before(), key=_newest_first)
    if last := log.find(after):
        rest = [event for event in others if event.place < last.place]
        return merge(rest, log.before(last.begins, last.data["step"]), key=_newest_first)
    place = next((place for place, event in enumerate(others) if event.id(job) == after), None)
    if place is None:
        raise ApiError(400, problem("api-after", given=after[:100]), "after")
    return merge(others[place + 1 :], log.before(log.begin_of(others[place])), key=_newest_first)


def _newest_first(event: Event) -> tuple[float, int]:
    return -event.at, -event.rank


def _other_events(job: Job) -> list[Event]:
    """Everything but steps, newest first."""
    happened = [
        *_beginning(job),
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
    return sorted(happened, key=lambda event: event.place)[::-1]


def _beginning(job: Job) -> Iterator[Event]:
    run = job.run
    yield Event(("created",), run.submitted, say("api-event-created", id=job.id), rank=FIRST)
    yield Event(("validating",), run.submitted, say("api-event-validating"), rank=FIRST)
    if run.started and job.status != "validating_files":
        yield Event(("started", run.request["attempt"]), run.started, say("api-event-started"), rank=FIRST)


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


class _StepEvents:
    """The steps of a job as events. The file counts the seconds of training, and its last line was the last to be
    written."""

    def __init__(self, job: Job):
        self.job, self.metrics = job, job.run.dir.metrics
        self.total = read_object(job.run.dir.progress).get("total")
        end = job.run.ended or time.time()
        last = next(logged_before(self.metrics), None)
        self.started = min(_changed(self.metrics), end) - (last.seconds if last else 0.0)

    def before(self, end: int | None = None, below: float = math.inf) -> Iterator[Event]:
        """Those in the first `end` bytes of the file (None: all) that are less than `below`, newest first."""
        return map(self._event, logged_before(self.metrics, end, below))

    def find(self, id: str) -> Event | None:
        """The step with this id; None if it is not that of a step."""
        match = STEP_ID.fullmatch(id)
        logged = logged_at(self.metrics, int(match[1], 16)) if match else None
        event = self._event(logged) if logged else None
        return event if event and event.id(self.job) == id else None

    def begin_of(self, event: Event) -> int:
        """Where the steps begin that are not older than this event, which is none."""
        seconds = event.at - self.started
        return first_byte_at(self.metrics, math.nextafter(seconds, math.inf) if event.rank > STEP else seconds)

    def _event(self, logged: Logged) -> Event:
        figures = _with_names_of_openai(logged.figures)
        shown = {"train_loss": "training loss", "train_reward_mean": "reward", "valid_loss": "validation loss"}
        listed = ", ".join(f"{label}={figures[name]:.4g}" for name, label in shown.items() if name in figures)
        message = say("api-event-step", step=logged.step, total=self.total or "?", figures=listed or "—")
        data = {"step": logged.step, "total_steps": self.total, **figures}
        at = max(self.started + logged.seconds, self.job.run.submitted)
        return Event(("step", logged.step), at, message, data=data, rank=STEP, begins=logged.begins)


def _with_names_of_openai(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for curve, value in figures.items() for name in METRIC_NAMES.get(curve, (curve,))}


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
            numbers = {
                name: value
                for name, value in line.items()
                if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value)
            }
            figures = logged.get(step, (0.0, {}))[1]
            logged[step] = (seconds, figures | _with_names_of_openai(numbers))
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
            "fine_tuned_model_checkpoint": f"{job.result_name}{CHECKPOINT_MARK}{self.step}",
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
