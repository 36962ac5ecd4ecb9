"""Results of finished runs from which others can start, and specs of runs that train further or export them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import distinct_titles, read_object, step_of
from engine.core.stages import STAGES, next_stages
from engine.data.datasets import read_dataset_info
from engine.data.validation import recommended
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.models.adapters import ADAPTER_FILES
from engine.preflight.model_checks import ADAPTER_SETTINGS
from engine.runs import runs
from engine.runs.runs import Run
from engine.spec.model_settings import NoQuantization, NoRopeScaling
from engine.spec.run_spec import RunSpec
from engine.spec.stage_settings import STAGE_SETTINGS as PARTS
from engine.spec.steps import examples_per_step

CHECKPOINT_ID = re.compile(r"(.+)/checkpoint-(\d+)")
MAX_NEXT_STAGE_EPOCHS = 3
MIN_ANSWERS_PER_STEP = 32  # in a stage that learns from scores of answers


@dataclass(frozen=True)
class Result:
    """The trained weights of a run: a LoRA `adapter`, or a full model. `stage` is the one that produced them; `step` is
    None except for a checkpoint, whose weights are not its run's last."""

    run: Run
    folder: Path
    stage: str
    adapter: bool
    step: int | None = None

    @property
    def id(self) -> str:
        """That of its run; of a checkpoint, with the name of its folder."""
        return self.run.id if self.step is None else f"{self.run.id}/{self.folder.name}"


def results(saves: Path) -> list[Result]:
    """The results of all runs in `saves`, newest first."""
    return [result for run in runs.find(saves) if (result := result_of(run))]


def checkpoints_of(run: Run) -> list[Result]:
    """The complete checkpoints of a LoRA training as adapters, newest first, whether or not it has ended. Of a full
    model they would each be a model of their own, and those of PiSSA and OLoRA fit a changed base only."""
    if run.kind != "training" or run.facts.method != "lora" or run.dir.initial.exists():
        return []
    folders = [folder for folder in run.dir.checkpoints() if (folder / ADAPTER_FILES[0]).is_file()]
    return [Result(run, folder, run.facts.stage, True, step_of(folder)) for folder in reversed(folders)]


def checkpoint(saves: Path, id: str) -> Result | None:
    """The checkpoint with this id; None if it is not that of one that is an adapter."""
    match = CHECKPOINT_ID.fullmatch(id)
    run = next((run for run in runs.find(saves, "training") if run.id == match[1]), None) if match else None
    return next((result for result in checkpoints_of(run) if result.id == id), None) if run else None


def run_of(id: str) -> str:
    """The id of the run to which the result or checkpoint with this id belongs."""
    match = CHECKPOINT_ID.fullmatch(id)
    return match[1] if match else id


def titles(left: Iterable[Result]) -> dict[str, str]:
    """The titles of their runs, by id; no two are equal. Those of trainings do not change when an export, which has the
    name of its training, has finished."""
    runs_left = {result.run.id: result.run for result in left}
    trained = {id: run.title for id, run in runs_left.items() if run.kind == "training"}
    return distinct_titles({id: run.title for id, run in runs_left.items()}) | distinct_titles(trained)


def result_of(run: Run) -> Result | None:
    """The result of the run; None while it is in progress, or if it has none."""
    if not run.final or not run.facts.result_stage:
        return None
    folder = run.facts.result_folder
    return Result(run, run.path / folder, run.facts.result_stage, folder == run.dir.adapter.name)


def base_of(result: Result) -> Path:
    """The folder of an adapter's base model, as far as it is known: for a hub model, where the run found it."""
    base = result.run.spec.model.model_name_or_path
    summary = read_object(result.run.dir.prepared / "summary.json")
    return Path(base if os.path.isdir(base) else summary.get("model_path") or base)


def new_export_spec(workplace: Workplace, weights: Mapping[str, float], **settings: Any) -> ExportSpec:
    """The spec that exports the results of the runs with these ids, each adapter with its weight; or a single full
    model. The base is loaded as in the run, but in full precision.

    Raises Refusal if a run has no weights, has another base than the first, or is a full model among others.
    """
    left = {result.run.id: result for result in results(workplace.saves)}
    if not weights:
        raise Refusal(problem("export-no-runs"))
    if missing := [id for id in weights if id not in left]:
        raise Refusal([problem("export-no-result", id=id) for id in missing])
    chosen = [left[id] for id in weights]
    whole = next((result for result in chosen if not result.adapter), None)
    if whole and len(chosen) > 1:
        raise Refusal(problem("export-whole-beside", name=whole.run.title))
    model = chosen[0].run.spec.model
    changes: dict[str, Any] = {
        "quantization": NoQuantization(),
        "trust_remote_code": model.trust_remote_code and workplace.allows_code_of(model.model_name_or_path),
    }
    if whole:
        changes["rope_scaling"] = NoRopeScaling()  # its configuration already contains the scaling
    adapters = {str(result.folder): weights[result.run.id] for result in chosen if result.adapter}
    base = str(whole.folder if whole else base_of(chosen[0]))
    model = model.used(base).model_copy(update=changes)
    return ExportSpec.read({"model": model.model_dump(), "adapters": adapters} | settings)


def possible_next_stages(run: Run) -> list[str]:
    """Stages that can continue from the result of the run: from a reward model, those whose answers it can score."""
    result = result_of(run)
    if not result or run.kind != "training":
        return []
    after = (
        [name for name, stage in STAGES.items() if stage.answers] if result.stage == "rm" else next_stages(result.stage)
    )
    return [stage for stage in after if stage in PARTS]


def next_spec(run: Run, stage: str, workplace: Workplace) -> RunSpec:
    """The spec of a run of `stage` that starts from the result of `run`.

    It keeps the model, the method and the sizes. The learning rate changes by the ratio of the usual values, a later
    stage gets few epochs, a stage with answers gets enough answers per step, and unsuitable data sets are replaced by
    the first suitable one. If the result is a reward model, it scores the answers, and the run starts from the newest
    SFT adapter if the reward model did not start from one; otherwise the newest reward model of the same base scores
    them. Raises Refusal if `stage` is not in `possible_next_stages(run)`.
    """
    if stage not in possible_next_stages(run):
        raise Refusal(problem("stage-cannot-follow", "stage", stage=stage, run=run.title))
    before, result = run.spec, result_of(run)
    assert result is not None  # otherwise no stage is possible
    plain: dict[str, Any] = before.model_dump()
    again = stage == before.stage.kind  # its learning target is the reward model's
    plain |= {"name": "", "stage": plain["stage"] if again else {"kind": stage}, "extra": {}}
    if (
        not again
        and STAGES[stage].answers
        and (reward_model := result if result.stage == "rm" else _newest(before, workplace, "rm"))
    ):
        plain["stage"]["reward_model"] = str(reward_model.folder)
        if "rewards" in PARTS[stage].model_fields:
            plain["stage"]["rewards"] = {"reward_model": 1.0}
    start: Result | None = result
    if result.stage == "rm":
        # It scores answers of a model that is trained: the one it started from itself, or the newest one that has
        # learned to answer.
        fresh = before.method.kind == "lora" and not before.model.adapter_path
        start = _newest(before, workplace, "sft", adapter=True) if fresh else None
    if start and start.adapter:
        plain["model"]["adapter_path"] = str(start.folder)
        # A PiSSA adapter is saved as an ordinary one of twice the rank.
        config = read_object(start.folder / ADAPTER_FILES[0])
        plain["method"] |= {name: config[name] for name in ADAPTER_SETTINGS if name in config}
        plain["method"]["init_lora_weights"] = "default"
    elif start:
        # Its own configuration already contains the scaling.
        plain["model"] |= {
            "model_name_or_path": str(result.folder),
            "adapter_path": None,
            "rope_scaling": {"kind": "none"},
        }
    form = STAGES[stage].form
    fitting = recommended(read_dataset_info(workplace.data)[0], form)
    kept = {name: weight for name, weight in before.data.datasets.items() if name in fitting}
    plain["data"]["datasets"] = kept or dict.fromkeys(fitting[:1], 1.0)
    plain["data"]["eval_datasets"] = [name for name in before.data.eval_datasets if name in fitting]
    if form not in ("text", "chat"):
        plain["data"]["packing"] = False
    training = plain["training"]
    training["learning_rate"] *= STAGES[stage].pace / STAGES[before.stage.kind].pace
    training["num_train_epochs"] = min(training["num_train_epochs"], MAX_NEXT_STAGE_EPOCHS)
    if STAGES[stage].answers:
        few = MIN_ANSWERS_PER_STEP / examples_per_step(before)
        training["gradient_accumulation_steps"] *= max(math.ceil(few), 1)
    return RunSpec.read(plain)


def _newest(spec: RunSpec, workplace: Workplace, stage: str, adapter: bool | None = None) -> Result | None:
    """The newest result of a stage with the same base; of any method, or only adapters."""
    base = spec.model.model_name_or_path
    return next(
        (
            result
            for result in results(workplace.saves)
            if result.stage == stage and result.run.kind == "training" and adapter in (None, result.adapter)
            if result.run.facts.base == base and result.run.state == "finished"
        ),
        None,
    )
