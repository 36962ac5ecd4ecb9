"""The trained weights that runs have left: what they are of, and how a model with them is loaded for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.core import regular_files
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_json
from engine.spec.model_settings import Model, NoRopeScaling
from engine.spec.run_spec import RunSpec


@dataclass(frozen=True)
class TrainedResult:
    """The trained weights of a run: an adapter, or a full model."""

    folder: Path
    spec: RunSpec  # of the run
    stage: str

    @property
    def adapter(self) -> bool:
        return self.folder.name == "adapter"

    @property
    def is_reward_model(self) -> bool:
        return self.stage == "rm"

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder.parent)

    @property
    def id(self) -> str:
        """The ID of the run: model/method/run."""
        return "/".join(self.folder.parent.parts[-3:])

    @property
    def title(self) -> str:
        return self.spec.name or self.folder.parent.name

    @property
    def base(self) -> str:
        """The model that the run started from."""
        return self.spec.model.model_name_or_path


def trained_result(folder: str | Path) -> TrainedResult | None:
    """The trained weights in a result `folder` of a run; None if it is not one."""
    folder = Path(folder)
    result, run = read_json(folder / RESULT_FILE), RunDir(folder.parent)
    if not result or folder.name not in ("adapter", "model"):
        return None
    try:
        return TrainedResult(folder, RunSpec.from_yaml(regular_files.read_text(run.spec)), result["stage"])
    except (OSError, Refusal, KeyError):
        return None


def model_part_of_base(result: TrainedResult) -> Model:
    """The `model` part with which the base of a result is loaded: as in its run, but without the adapter it
    continued."""
    return result.spec.model.used(result.spec.model.model_name_or_path)


def model_part_of_whole(result: TrainedResult) -> Model:
    """The same for a full model from a run; its rope scaling is already in its configuration."""
    changes = {"model_name_or_path": str(result.folder), "rope_scaling": NoRopeScaling()}
    return model_part_of_base(result).model_copy(update=changes)
