"""Fine-tuning jobs: the training runs of the stages that OpenAI has, whoever started them.

Nothing of a job is stored but what request.json says under `api` of a run that was created here: the names by which its
client knows the model, suffix and metadata. Everything else is read from the run's folder and its spec.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.api import files
from engine.api.base_models import BaseModels
from engine.api.callers import Caller
from engine.api.errors import ApiError, not_found
from engine.api.graders import PARAM, Rewards, grader_of, rewards
from engine.api.job_requests import METHOD_OF, JobRequest, name_part
from engine.api.job_specs import base_learning_rate, decided_hyperparameters, job_spec
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import read_json, read_object, write_json
from engine.core.stages import STAGES
from engine.data import dataset_info_edits, owners
from engine.data.columns import columns_of, first_rows
from engine.data.dataset_info import INFO_FILE, Dataset, read_dataset_info
from engine.launch.workspace import Workplace
from engine.runs import failures, queue, queue_order, runs
from engine.runs.compare import spec_of
from engine.runs.facts import newest_value
from engine.runs.progress import progress
from engine.runs.results import result_of
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec

ORGANIZATION = "athanor"
CHECKPOINT_MARK = ":ckpt-step-"  # between the name of a result and the step of a checkpoint
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
    models: BaseModels

    @cached_property
    def id(self) -> str:
        return id_of("ftjob-", self.run.id)

    @property
    def short_id(self) -> str:
        """The end of the name of its model."""
        return self.id.removeprefix("ftjob-")[:8]

    @cached_property
    def request(self) -> Mapping[str, Any]:
        """What its client asked for; {} for a run that was started elsewhere."""
        request = self.run.request.get("api")
        return request if isinstance(request, dict) else {}

    @property
    def metadata(self) -> dict[str, str] | None:
        return self.request.get("metadata")

    @cached_property
    def model(self) -> str:
        return self.request.get("model") or self.models.name_of(self.run.facts.base)

    @property
    def result_name(self) -> str:
        """The name of its model, once it has one."""
        suffix = name_part(self.request.get("suffix") or "")
        return f"ft:{self.model}:{ORGANIZATION}:{suffix}:{self.short_id}"

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
        spec, facts = spec_of(self.run), self.run.facts
        trained, held_out = (spec.data.datasets, spec.data.eval_datasets) if spec else (facts.data, ())
        name = METHOD_OF[facts.stage]
        settings = self._hyperparameters(spec) if spec else {}  # unknown if it has been damaged by hand
        method: dict[str, Any] = {"hyperparameters": settings}
        if name == "reinforcement":
            method["grader"] = self.request.get("grader") or (_grader_of(spec) if spec else None)
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
                name: settings.get(name) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
            },
            "integrations": [],
            "metadata": self.metadata,
            "method": {"type": name, name: method},
            "model": self.model,
            "organization_id": ORGANIZATION,
            "result_files": [self.results_file_id] if self.status == "succeeded" else [],
            "seed": spec.training.seed if spec else None,
            "status": self.status,
            "trained_tokens": None if tokens is None else int(tokens),
            "training_file": ", ".join(ids.get(name, name) for name in trained),
            "user_provided_suffix": self.request.get("suffix"),
            "validation_file": ", ".join(ids.get(name, name) for name in held_out) or None,
        }

    def _hyperparameters(self, spec: RunSpec) -> dict[str, Any]:
        usual = RunSpec().training.learning_rate * STAGES[spec.stage.kind].pace
        return decided_hyperparameters(spec, self.request.get("learning_rate") or usual)


def _grader_of(spec: RunSpec) -> dict[str, Any]:
    """The grader of a run that was started elsewhere, by its rewards and the column with the answers of its data."""
    known = {dataset.name: dataset.columns for dataset in read_dataset_info(Path(spec.data.dataset_dir))[0]}
    columns = next((known[name] for name in spec.data.datasets if name in known), {})
    column = columns.get("response") or f"{columns.get('messages', 'messages')}[-1].content"
    return grader_of(getattr(spec.stage, "rewards", {}), column)


def jobs(workplace: Workplace, models: BaseModels, caller: Caller) -> Iterator[Job]:
    """The caller's jobs, newest first."""
    for run in runs.find(workplace.saves, "training"):
        if caller.sees(run.by) and run.facts.stage in METHOD_OF:
            yield Job(run, models)


def find(workplace: Workplace, models: BaseModels, id: str, caller: Caller) -> Job:
    """The job with this id. Raises ApiError if the caller has none."""
    for job in jobs(workplace, models, caller):
        if job.id == id:
            return job
    raise not_found("api-no-job", id, "fine_tuning_job_id", "fine_tune_not_found")


def create(workplace: Workplace, models: BaseModels, request: JobRequest, caller: Caller) -> Job:
    """Submit the run of a job. Rows that cannot be used do not prevent it: the job fails and names their lines. Raises
    ApiError or Refusal."""
    base = models.get(request.model)
    if base is None:
        known = ", ".join(list(models)[:20]) or "—"
        raise ApiError(404, problem("api-no-base", given=request.model[:100], known=known), "model", "model_not_found")
    training = files.find(workplace, request.training_file, caller, "training_file").dataset
    used = [training]
    if request.validation_file:
        used.append(files.find(workplace, request.validation_file, caller, "validation_file").dataset)
    grader = request.method.reinforcement.grader if request.method and request.method.reinforcement else None
    chosen = rewards(grader) if grader is not None else Rewards()
    entries = [_entry_with_reference(workplace, dataset, chosen.column) for dataset in used if chosen.column]
    names = [dataset.name for dataset in used]
    spec = job_spec(request, base, workplace, names[0], "".join(names[1:]), dict(chosen.weights))
    record = {
        "model": request.model,
        "suffix": request.suffix,
        "metadata": request.metadata,
        "learning_rate": base_learning_rate(base, workplace, spec.stage.kind),
    } | ({"grader": grader} if grader is not None else {})
    with (
        caller.acting(workplace.saves, "start", f"training {spec.name}".strip()),
        _added(workplace, names, entries, chosen.column, caller) as own,
    ):
        spec = spec.change("data.datasets", {own[0]: 1.0}).change("data.eval_datasets", own[1:])
        run = runs.submit(spec, workplace, caller.name, {"api": record}, fails_later=_is_about_rows)
    return Job(run, models)


def _is_about_rows(obstacle: Problem) -> bool:
    return obstacle.field in DATA_FIELDS


def _entry_with_reference(workplace: Workplace, dataset: Dataset, column: str) -> dict[str, Any]:
    """An entry of the same file whose answers are in this column. Raises ApiError if its rows do not have it; of rows
    that cannot be read, that is left to the run."""
    before = dataset_info_edits.entry_of(workplace.data, dataset.name)
    rows = first_rows(dataset.files[0], dataset.encoding)
    roles = {"prompt": "messages", "response": column}
    if "tools" in columns_of(rows):
        roles["tools"] = "tools"
    mapping = dataset_info_edits.ColumnMapping("chat", roles)
    try:
        return dataset_info_edits.entry_for_mapping(before["file_name"], mapping, rows, before)
    except Refusal as refusal:
        raise ApiError(400, refusal.problems[0], PARAM, "invalid_grader") from None


@contextmanager
def _added(
    workplace: Workplace, names: Sequence[str], entries: Sequence[Mapping[str, Any]], column: str, caller: Caller
) -> Iterator[list[str]]:
    """The data sets `names` or, if there are `entries`, those with these entries, which are added if there are none
    yet, and removed again if what follows fails."""
    own, new = list(names), []
    try:
        for number, entry in enumerate(entries):
            stem = f"{names[number]}.{column}"[: dataset_info_edits.MAX_NAME_LENGTH]
            known = read_object(workplace.data / INFO_FILE)
            same = next((name for name in known if name.startswith(stem) and known[name] == entry), None)
            if same is None:
                new.append(same := dataset_info_edits.add(workplace.data, stem, dict(entry)))
                owners.claim(workplace.data, [owners.set_id(same)], caller.name)
            own[number] = same
        yield own
    except BaseException:
        for name in new:
            dataset_info_edits.remove(workplace.data, name)
            owners.claim(workplace.data, [owners.set_id(name)], "")
        raise


def cancel(job: Job, caller: Caller) -> None:
    """End the job for good. Raises Refusal if it has ended."""
    saves = queue.saves_of(job.run.path)
    with caller.acting(saves, "kill", job.run.id, job.run.by):
        with runs.refusing_write_errors(saves), queue.locked(saves):
            now = Job(runs.read(job.run.path, saves), job.models)  # it may have been resumed in the meantime
            if paused := now.run.state == "stopped" and now.status == "paused":
                request = read_json(now.run.dir.request)
                stop = {"how": "kill", "by": caller.name, "at": time.time()}
                write_json(now.run.dir.request, request | {"stop": stop})
        if not paused:
            runs.stop(now.run, "kill", caller.name)


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
            runs.resume(job.run, caller.name, data=Path(job.run.spec.data.dataset_dir))
