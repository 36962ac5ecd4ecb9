"""Fine-tuning jobs: the training runs of the stages that OpenAI has, whoever started them.

Nothing of a job is stored but what request.json says under `api` of a run that was created here: the names by which its
client knows the model, suffix and metadata. Everything else is read from the run's folder and its spec.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.api import base_models, files
from engine.api.base_models import BaseModel
from engine.api.callers import Caller
from engine.api.errors import ApiError, not_found
from engine.api.graders import rewards
from engine.api.job_requests import METHOD_OF, JobRequest
from engine.api.job_specs import base_learning_rate, decided_hyperparameters, job_spec
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import read_json, write_json
from engine.core.stages import STAGES
from engine.data import dataset_info_edits, owners
from engine.launch.workspace import Workplace
from engine.runs import failures, queue, queue_order, runs
from engine.runs.facts import newest_value
from engine.runs.progress import progress
from engine.runs.results import result_of
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec

ORGANIZATION = "athanor"
DATA_FIELDS = {"data.datasets": "training_file", "data.eval_datasets": "validation_file"}
STATUS = {
    "queued": "queued",
    "preparing": "validating_files",
    "running": "running",
    "finished": "succeeded",
    "failed": "failed",
    "interrupted": "failed",
}


def id_of(prefix: str, *parts: object) -> str:
    """An id of something that is not stored anywhere: the same for the same parts."""
    return f"{prefix}{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class Job:
    """A run as a job. `models`: the base models by name."""

    run: Run
    models: Mapping[str, BaseModel]

    @cached_property
    def id(self) -> str:
        return id_of("ftjob-", self.run.id)

    @cached_property
    def request(self) -> Mapping[str, Any]:
        """What its client asked for; {} for a run that was started elsewhere."""
        request = self.run.request.get("api")
        return request if isinstance(request, dict) else {}

    @property
    def metadata(self) -> dict[str, str] | None:
        return self.request.get("metadata")

    @property
    def model(self) -> str:
        return self.request.get("model") or base_models.name_of(self.models, self.run.facts.base)

    @property
    def result_name(self) -> str:
        """The name of its model, once it has one."""
        suffix = self.request.get("suffix") or ""
        return f"ft:{self.model}:{ORGANIZATION}:{suffix}:{self.id.removeprefix('ftjob-')[:8]}"

    @property
    def fine_tuned_model(self) -> str | None:
        return self.result_name if self.status == "succeeded" and result_of(self.run) else None

    @property
    def results_file_id(self) -> str:
        return id_of("file-", "results", self.run.id)

    @property
    def status(self) -> str:
        """OpenAI's word for the state of the run."""
        stop = self.run.request.get("stop") or {}
        if self.run.state == "queued" and self.run.request.get("held"):
            return "paused"
        if self.run.state == "stopping":
            return "cancelled" if stop.get("how") == "kill" else "running"
        if self.run.state == "stopped":
            return "cancelled" if stop.get("how") == "kill" else "paused"
        return STATUS[self.run.state]

    @property
    def error(self) -> dict[str, Any] | None:
        """Why it failed, with the lines of the file that cannot be used."""
        why = failures.explain(self.run) if self.status == "failed" else None
        if why is None:
            return None
        fields = [entry.get("field", "") for entry in why.problems]
        param = next((DATA_FIELDS[field] for field in fields if field in DATA_FIELDS), None)
        message = "\n".join(filter(None, (why.what(), why.advice())))
        return {"code": f"invalid_{param}" if param else why.code or "failed", "message": message, "param": param}

    def as_object(self, ids: Mapping[str, str]) -> dict[str, Any]:
        """OpenAI's job object; `ids`: of files by the names of their data sets."""
        ended = self.run.ended if self.run.final else None
        try:
            spec = self.run.spec
        except Refusal:  # damaged by hand
            spec = RunSpec()
        usual = RunSpec().training.learning_rate * STAGES[spec.stage.kind].pace
        settings = decided_hyperparameters(spec, self.request.get("learning_rate") or usual)
        method: dict[str, Any] = {"hyperparameters": settings}
        name = METHOD_OF.get(spec.stage.kind, "supervised")
        if name == "reinforcement":
            method["grader"] = self.request.get("grader") or _grader_of(spec)
        running = self.run.state == "running" and self.status == "running"
        eta = progress(self.run).eta_s if running else None
        tokens = newest_value(self.run.dir.metrics, "num_tokens") if self.status == "succeeded" else None
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": int(self.run.submitted),
            "error": self.error,
            "estimated_finish": int(time.time() + eta) if eta is not None else None,
            "fine_tuned_model": self.fine_tuned_model,
            "finished_at": int(ended) if ended and self.status != "paused" else None,
            "hyperparameters": {
                name: settings[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
            },
            "integrations": [],
            "metadata": self.metadata,
            "method": {"type": name, name: method},
            "model": self.model,
            "organization_id": ORGANIZATION,
            "result_files": [self.results_file_id] if self.status == "succeeded" else [],
            "seed": spec.training.seed,
            "status": self.status,
            "trained_tokens": None if tokens is None else int(tokens),
            "training_file": ", ".join(ids.get(name, name) for name in spec.data.datasets),
            "user_provided_suffix": self.request.get("suffix"),
            "validation_file": ", ".join(ids.get(name, name) for name in spec.data.eval_datasets) or None,
        }


def _grader_of(spec: RunSpec) -> dict[str, Any]:
    """A grader for a run that was started elsewhere; OpenAI's clients expect one."""
    return {
        "type": "string_check",
        "name": " + ".join(getattr(spec.stage, "rewards", ())),
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    }


def jobs(workplace: Workplace, models: Mapping[str, BaseModel], caller: Caller) -> Iterator[Job]:
    """The caller's jobs, newest first."""
    for run in runs.find(workplace.saves, "training"):
        if caller.sees(run.by) and run.facts.stage in METHOD_OF:
            yield Job(run, models)


def find(workplace: Workplace, models: Mapping[str, BaseModel], id: str, caller: Caller) -> Job:
    """The job with this id. Raises ApiError if the caller has none."""
    for job in jobs(workplace, models, caller):
        if job.id == id:
            return job
    raise not_found("api-no-job", id, "fine_tuning_job_id", "fine_tune_not_found")


def create(workplace: Workplace, models: Mapping[str, BaseModel], request: JobRequest, caller: Caller) -> Job:
    """Submit the run of a job. Rows that cannot be used do not prevent it: the job fails and names their lines. Raises
    ApiError or Refusal."""
    base = models.get(request.model)
    if base is None:
        known = ", ".join(list(models)[:20]) or "—"
        raise ApiError(404, problem("api-no-base", given=request.model[:100], known=known), "model", "model_not_found")
    training = files.find(workplace, request.training_file, caller, "training_file").dataset.name
    validation = ""
    if request.validation_file:
        validation = files.find(workplace, request.validation_file, caller, "validation_file").dataset.name
    weights: dict[str, float] = {}
    grader = request.method.reinforcement.grader if request.method and request.method.reinforcement else None
    if grader is not None:
        chosen = rewards(grader)
        weights = dict(chosen.weights)
        training, validation = (
            name and _with_reference(workplace, name, chosen.column, caller) for name in (training, validation)
        )
    spec = job_spec(request, base, workplace, training, validation, weights)
    record = {
        "model": request.model,
        "suffix": request.suffix,
        "metadata": request.metadata,
        "learning_rate": base_learning_rate(base, workplace, spec.stage.kind),
    } | ({"grader": grader} if grader is not None else {})
    with caller.acting(workplace.saves, "start", f"training {spec.name}".strip()):
        run = runs.submit(spec, workplace, caller.name, {"api": record}, fails_later=_is_about_rows)
    return Job(run, models)


def _is_about_rows(obstacle: Problem) -> bool:
    return obstacle.field in DATA_FIELDS


def _with_reference(workplace: Workplace, name: str, column: str, caller: Caller) -> str:
    """The data set of the same file whose answers are in this column; it is added if there is none yet."""
    file_name = dataset_info_edits.entry_of(workplace.data, name)["file_name"]
    entry = {"file_name": file_name, "columns": {"prompt": "messages", "response": column, "tools": "tools"}}
    own = f"{name}.{column}"[: dataset_info_edits.MAX_NAME_LENGTH]
    try:
        if dataset_info_edits.entry_of(workplace.data, own) == entry:
            return own
    except Refusal:  # there is none
        pass
    added = dataset_info_edits.add(workplace.data, own, entry)
    owners.claim(workplace.data, [owners.set_id(added)], caller.name)
    return added


def cancel(job: Job, caller: Caller) -> None:
    """End the job for good. Raises Refusal if it has ended."""
    saves = queue.saves_of(job.run.path)
    with caller.acting(saves, "kill", job.run.id, job.run.by):
        if job.run.state != "stopped" or job.status != "paused":
            runs.stop(job.run, "kill", caller.name)
            return
        with runs.refusing_write_errors(saves), queue.locked(saves):
            request = read_json(job.run.dir.request)
            write_json(job.run.dir.request, request | {"stop": {"how": "kill", "by": caller.name, "at": time.time()}})


def pause(job: Job, caller: Caller) -> None:
    """Save a checkpoint and stop, or hold the job if it waits. Raises Refusal if it can be neither."""
    saves, waits = queue.saves_of(job.run.path), job.run.state == "queued"
    with caller.acting(saves, "reorder" if waits else "stop", job.run.id, job.run.by):
        if waits:
            queue_order.hold(job.run, caller.name)
        else:
            runs.stop(job.run, "save", caller.name)


def resume(job: Job, caller: Caller) -> None:
    """Continue a paused job. Raises ApiError or Refusal if it is not paused."""
    if job.status != "paused":
        raise ApiError(400, problem("api-not-paused", status=job.status), "fine_tuning_job_id")
    saves, waits = queue.saves_of(job.run.path), job.run.state == "queued"
    with caller.acting(saves, "reorder" if waits else "resume", job.run.id, job.run.by):
        if waits:
            queue_order.release(job.run, caller.name)
        else:
            runs.resume(job.run, caller.name)
