"""A training as a script that needs only the libraries: what cannot be written as one, and the child that writes it.

The folder that comes out has `train.py`, the rows as the run trained on them, the tokenizer, and the versions of the
libraries. It depends on nothing of Athanor, and computes the same losses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args

from engine.core.permissions import apply_umask
from engine.core.problems import Problem, Refusal, problem
from engine.core.regular_files import read_text
from engine.core.rundir import RunDir, read_json, read_object
from engine.launch.accelerate_config import is_fsdp
from engine.launch.command import OFFLINE_VARIABLES
from engine.launch.workspace import Workplace
from engine.models import child
from engine.models.discovery import is_hub_id
from engine.models.facts import inspect_model
from engine.models.quantized_weights import DEQUANTIZED, UNPACKED
from engine.models.vocabulary import rows_of_adapter
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.setting_limits import Limit, exceeded, named
from engine.spec.stage_settings import DpoLoss

SCRIPT_FILE = "train.py"
SPARE_BYTES = 200_000_000  # disk space for the tokenizer, and for others
MAX_SECONDS = 600  # for importing the libraries and copying the rows
LIMITS = (
    Limit("stage", ("pt", "sft", "rm", "dpo", "kto", "orpo", "simpo")),
    Limit("stage.loss_type", tuple(loss for loss in get_args(DpoLoss) if loss != "bco_pair"), ("dpo",)),
    Limit("method.init_lora_weights", ("default", "gaussian")),
    Limit("method.expert_r", (None,)),
    Limit("model.add_tokens", ([],)),
    Limit("model.add_special_tokens", ([],)),
    Limit("model.resize_embeddings", (False,)),
    Limit("model.adapter_path", ("",), ("rm",)),
    Limit("hardware.strategy", ("auto", "single", "ddp")),
    Limit("hardware.num_machines", (1,)),
)


def training_spec(spec: Spec) -> RunSpec:
    """The spec as that of a training. Raises Refusal for another kind of run."""
    if not isinstance(spec, RunSpec):
        raise Refusal(problem("script-not-with", given=spec.kind, allowed=RunSpec.kind))
    return spec


def script_problems(run: RunDir, spec: RunSpec, workplace: Workplace) -> list[Problem]:
    """Why the run cannot be written as a script, as far as its spec and its files say; the child also looks at the
    model."""
    problems = [
        problem("script-not-with", limit.path, given=value, allowed=named(limit.allowed))
        for limit, value in exceeded(LIMITS, spec)
    ]
    if run.accelerate.exists() and is_fsdp(read_text(run.accelerate)):
        problems.append(problem("script-not-with", "hardware.strategy", given="fsdp2", allowed="single, ddp"))
    if rows_of_adapter(spec.model.adapter_path):
        problems.append(problem("script-adapter-rows", "model.adapter_path", adapter=spec.model.adapter_path))
    if "processes" in read_object(run.request):
        problems.append(problem("script-moved"))
    if not all((run.prepared / f"{split}.arrow").is_file() for split in _splits(run) or [""]):
        return [*problems, problem("script-no-rows")]
    if not decided_precision(run, spec):
        problems.append(problem("script-no-precision", "training.precision"))
    return problems + _model_problems(Path(model_path(run)), spec, workplace)


def _model_problems(folder: Path, spec: RunSpec, workplace: Workplace) -> list[Problem]:
    name, field, model = spec.model.model_name_or_path, "model.model_name_or_path", inspect_model(folder)
    if spec.model.trust_remote_code and not workplace.allows_code_of(name):
        return [problem("model-remote-code", field, model=name, model_type=model.model_type)]
    if not folder.is_dir():
        return [problem("script-no-model", field, model=name)]
    if is_hub_id(name) and not os.path.isdir(name) and spec.model.hub != "huggingface":
        return [problem("script-not-with", "model.hub", given=spec.model.hub, allowed="huggingface")]
    if model.quantized in (*DEQUANTIZED, *UNPACKED):
        return [problem("script-quantized-model", field, how=model.quantized)]
    if model.has_towers or model.experts_per_token:
        return [problem("script-model", field, architecture=model.architecture)]
    return []


def ran_on_cpu(run: RunDir, spec: RunSpec) -> bool:
    """Whether the run computed on the CPU, by its spec or by what its supervisor had."""
    return spec.hardware.device == "cpu" or read_object(run.keeper).get("devices") == ""


def decided_precision(run: RunDir, spec: RunSpec) -> str:
    """The precision in which the run computed, whatever this machine has; "" if that is unknown."""
    if spec.training.precision != "auto":
        return spec.training.precision
    return "fp32" if ran_on_cpu(run, spec) else read_object(run.keeper).get("precision") or ""


def _splits(run: RunDir) -> list[str]:
    return list((read_json(run.prepared / "summary.json") or {}).get("splits", ()))


def model_path(run: RunDir) -> str:
    """The folder of the model that the run trained, which may be a hub's in a cache."""
    return (read_json(run.prepared / "summary.json") or {}).get("model_path", "")


def write_script(run: RunDir, spec: RunSpec, workplace: Workplace, folder: Path) -> None:
    """Write the script and what belongs to it into `folder`, which must not exist or be empty. Raises Refusal."""
    if problems := script_problems(run, spec, workplace):
        raise Refusal(problems)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(problem("script-folder-taken", folder=folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _run_child(run, partial)
        for path in (partial, *partial.rglob("*")):
            apply_umask(path)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_archive(run: RunDir, spec: RunSpec, workplace: Workplace, scratch: Path) -> Path:
    """The same as a zip file, the only one in a new folder in `scratch`. Raises Refusal, also if there is no space for
    the rows and the archive of them."""
    scratch.mkdir(parents=True, exist_ok=True)
    needed = 2 * sum(file.stat().st_size for file in run.prepared.glob("*.arrow")) + SPARE_BYTES
    if needed > (free := shutil.disk_usage(scratch).free):
        raise Refusal(problem("script-no-space", needed=f"{needed / 1e9:.1f} GB", free=f"{free / 1e9:.1f} GB"))
    parent = Path(tempfile.mkdtemp(prefix="script-", dir=scratch))
    try:
        folder = parent / f"{run.path.name}-script"
        write_script(run, spec, workplace, folder)
        archive = shutil.make_archive(str(folder), "zip", parent, folder.name)
        shutil.rmtree(folder)
    except BaseException:
        shutil.rmtree(parent, ignore_errors=True)
        raise
    return Path(archive)


def _run_child(run: RunDir, folder: Path) -> None:
    """Let a child write into `folder`. Raises Refusal with its problems, or with the last line of its error."""
    module, where = "engine.worker.write_script", (str(run.path), str(folder))
    try:
        child.ask(module, *where, seconds=MAX_SECONDS, environment=OFFLINE_VARIABLES)
    except child.TooSlow:
        raise Refusal(problem("script-too-slow", seconds=MAX_SECONDS)) from None
    except child.NoAnswer as failure:
        raise Refusal(_problems_of(failure.output) or problem("script-failed", why=failure)) from None


def _problems_of(output: str) -> list[Problem]:
    """The problems that the child has printed as JSON; none if it has failed otherwise."""
    with contextlib.suppress(ValueError, TypeError):
        return [Problem(**values) for values in json.loads(output)]
    return []
