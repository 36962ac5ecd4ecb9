"""Models of the interface: the base models, and the results of jobs as `ft:…`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.api import jobs
from engine.api.base_models import BaseModel, BaseModels
from engine.api.callers import Caller
from engine.api.errors import ApiError, not_found
from engine.core.problems import NOTHING, problem
from engine.launch.workspace import Workplace
from engine.runs import queue, runs
from engine.runs.results import Result, checkpoints_of, result_of
from engine.serving import servers


@dataclass(frozen=True)
class Model:
    """A base model, the result of a job, or one of its checkpoints."""

    name: str
    base: BaseModel | None = None
    job: jobs.Job | None = None
    checkpoint: Result | None = None

    def as_object(self) -> dict[str, Any]:
        """OpenAI's model object."""
        created = (
            self.job.run.ended or self.job.run.submitted
            if self.job
            else _changed(Path(self.base.folder))
            if self.base
            else 0
        )
        owner = self.job.run.by or jobs.ORGANIZATION if self.job else "system"
        return {"id": self.name, "object": "model", "created": int(created), "owned_by": owner}

    def choice(self, workplace: Workplace) -> servers.Choice:
        """What a chat server has to load, with the inference engine of one that has loaded the base already. Raises
        Refusal."""
        base = self.base.folder if self.base and not self.job else ""
        ids = [self.served_name] if self.job else []
        return servers.choose_loaded(workplace, base, ids)

    @property
    def served_name(self) -> str:
        """Its name in requests to the chat server; "" for a base, which is called as the server says."""
        return self.checkpoint.id if self.checkpoint else self.job.run.id if self.job else ""


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def list_models(workplace: Workplace, models: BaseModels, caller: Caller) -> list[Model]:
    """The base models, then the caller's results, newest first."""
    bases = [Model(name, base=base) for name, base in models.items()]
    own = jobs.jobs(workplace, models, caller)
    return bases + [Model(job.result_name, job=job) for job in own if result_of(job.run)]


def find(workplace: Workplace, models: BaseModels, name: str, caller: Caller) -> Model:
    """The model of this name. Raises ApiError if the caller has none."""
    if name in models:
        return Model(name, base=models[name])
    result_name, _, step = name.partition(jobs.CHECKPOINT_MARK)
    for job in jobs.jobs(workplace, models, caller):
        if result_name.endswith(job.short_id) and job.result_name == result_name:
            if step:
                return _checkpoint(name, job, step)
            if result_of(job.run):
                return Model(name, job=job)
    raise not_found("api-no-model", name, "model", "model_not_found")


def _checkpoint(name: str, job: jobs.Job, step: str) -> Model:
    """The model of a checkpoint. Raises ApiError if it cannot be asked, with those that can."""
    usable = {str(result.step): result for result in checkpoints_of(job.run)}
    if step not in usable:
        steps = problem("api-no-checkpoint", step=step[:20], known=", ".join(usable) or NOTHING)
        raise ApiError(404, steps, "model", "model_not_found")
    return Model(name, job=job, checkpoint=usable[step])


def delete(model: Model, caller: Caller) -> None:
    """Delete a result, and with it the run and its job. Raises ApiError for a base model or a checkpoint; Refusal."""
    if model.checkpoint:
        raise ApiError(403, problem("api-checkpoint-stays", name=model.name), "model", "insufficient_permissions")
    if model.job is None:
        raise ApiError(403, problem("api-base-stays", name=model.name), "model", "insufficient_permissions")
    run = model.job.run
    with caller.acting(queue.saves_of(run.path), "delete", run.id, run.by):
        runs.delete(run)
