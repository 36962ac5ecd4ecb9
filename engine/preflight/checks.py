"""What prevents a spec from running on this machine: files, GPUs, disk, packages. All problems at once, before the
start.

`engine.spec.contradictions.spec_problems` is its pure counterpart, about the spec alone.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from engine.core import hardware, leases
from engine.core.problems import Problem, Refusal, problem
from engine.launch import command
from engine.launch.engine_choice import read_choice
from engine.launch.workspace import Workplace
from engine.models.reward_models import reward_model_problems
from engine.preflight import doctor
from engine.preflight.data_checks import any_dataset_has_answers, dataset_problems
from engine.preflight.division import machine_problems
from engine.preflight.model_checks import chosen_model_problems, model_is_readable, trained_parameters
from engine.preflight.package_checks import package_problems
from engine.preflight.suitable_gpus import gpu_without_bf16
from engine.spec.hardware_settings import Hardware
from engine.spec.run_spec import RunSpec
from engine.spec.stage_settings import COMPARING_REWARDS
from engine.spec.strategies import LIMITS, NAMES

NO_GRADIENT_CODE = "attention-not-trained-on-cpu"


def preflight_problems(spec: RunSpec, workplace: Workplace, *, wait: bool = True) -> list[Problem]:
    """Everything on this machine that would prevent `spec` from running. Empty: it can start. Without `wait`, packages
    that are still being tried are not reported (`engine.preflight.doctor`)."""
    problems = workplace.problems(spec)
    outside = {problem.field for problem in problems}  # not checked, not even whether it exists
    problems += chosen_model_problems(spec, workplace, outside)
    if "data.dataset_dir" not in outside:
        problems += dataset_problems(spec)
    problems += _reward_problems(spec, workplace, outside)
    problems += engine_problems(spec.hardware, workplace.saves) + device_problems(spec) + package_problems(spec, wait)
    weights = trained_parameters(spec) if model_is_readable({problem.field for problem in problems}) else 0
    return problems + _disk_problems(spec, workplace, weights or 0)


def _reward_problems(spec: RunSpec, workplace: Workplace, outside: set[str]) -> list[Problem]:
    """An invalid reward model, a missing reward file, data without answers to compare with."""
    stage, problems = spec.stage, []
    model, file = getattr(stage, "reward_model", "").strip(), getattr(stage, "reward_file", None)
    if model and "stage.reward_model" not in outside:
        problems += reward_model_problems(Path(model))
    if file and "stage.reward_file" not in outside and not os.path.isfile(file):
        roots = ", ".join(map(str, workplace.reward_files))
        problems.append(problem("reward-file-missing", "stage.reward_file", path=file, roots=roots))
    comparing = [reward for reward in getattr(stage, "rewards", ()) if reward in COMPARING_REWARDS]
    if comparing and "data.dataset_dir" not in outside and not any_dataset_has_answers(spec):
        names = ", ".join(spec.data.datasets)
        problems.append(problem("references-not-there", "stage.rewards", reward=comparing[0], names=names))
    return problems


def engine_problems(chosen: Hardware, saves: Path) -> list[Problem]:
    """What the engine of a saves folder does not offer: several machines here, GPUs by their indices on Slurm. Or what
    is wrong with engine.yaml."""
    try:
        on_slurm = read_choice(saves).engine == "slurm"
    except Refusal as refusal:
        return refusal.problems
    if on_slurm and chosen.devices:
        indices = ", ".join(map(str, chosen.devices))
        return [problem("devices-on-slurm", "hardware.devices", given=indices)]
    if not on_slurm and chosen.machines > 1:
        return [problem("machines-on-local", "hardware.num_machines", given=chosen.machines)]
    return []


def driver_problems(chosen: Hardware) -> list[Problem]:
    """That the driver does not list the GPUs: a run that may use them would get none."""
    failure = None if chosen.device == "cpu" else hardware.planned_gpu_failure()
    return [failure] if failure else []


def device_problems(spec: RunSpec) -> list[Problem]:
    """What prevents a training on the devices that it names: missing ones, or settings that they do not support."""
    chosen, gpus = spec.hardware, hardware.planned_gpus()
    attention, cpu = spec.model.attn_implementation, command.on_cpu(spec, len(gpus))
    if failed := driver_problems(chosen):
        return failed
    if cpu and attention == "flash_attention_2":
        return [problem("attention-needs-card", "model.attn_implementation", name=attention)]
    if cpu and attention == "flex_attention":
        return [problem(NO_GRADIENT_CODE, "model.attn_implementation", name=attention)]
    if attention == "flash_attention_2" and spec.training.precision == "fp32":
        return [problem("attention-needs-half", "model.attn_implementation")]
    if spec.extra.get("tf32") is True and cpu:
        return [problem("tf32-needs-card", "extra")]
    if chosen.strategy.kind in LIMITS and not command.can_divide_weights(spec, len(gpus)):
        return [problem("strategy-needs-gpus", "hardware.strategy", strategy=NAMES[chosen.strategy.kind])]
    if chosen.device == "auto" and cpu and spec.training.precision == "fp16":
        return [problem("fp16-on-cpu", "training.precision")]
    if cpu:
        return []
    if missing := missing_gpus(chosen):
        return missing
    if chosen.num_processes > chosen.num_machines * len(gpus):
        there = chosen.num_machines * len(gpus)
        return [problem("too-few-cards", "hardware.num_processes", wanted=chosen.num_processes, there=there)]
    if doctor.torch_cuda() == "":
        name = next(gpu.name for gpu in gpus if not chosen.devices or gpu.index in chosen.devices)
        return [problem("torch-without-cuda", "hardware.device", name=name)]
    if problems := machine_problems(spec, chosen.strategy.kind):
        return problems
    if spec.training.precision == "bf16" and (old := gpu_without_bf16(spec)):
        return [problem("bf16-not-there", "training.precision", name=old.name, capability=old.capability)]
    return []


def missing_gpus(chosen: Hardware) -> list[Problem]:
    """The problem that there is no GPU where one is needed, or not that one, or that none can be leased."""
    there = [gpu.index for gpu in hardware.planned_gpus()]
    if not there:
        return [problem("no-cards", "hardware.devices" if chosen.devices else "hardware.device")]
    unknown = [index for index in chosen.devices if index not in there]
    if unknown:
        named = ", ".join(map(str, there))
        return [problem("card-unknown", "hardware.devices", given=unknown[0], there=named)]
    return [] if hardware.plans_elsewhere() else list(filter(None, [leases.obstacle()]))


def _disk_problems(spec: RunSpec, workplace: Workplace, trained: int) -> list[Problem]:
    saves = workplace.saves
    # A missing folder will be created.
    existing = next(folder for folder in (saves, *saves.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return [problem("saves-not-writable", folder=saves, why=os.strerror(errno.EACCES))]
    needed, free = disk_needed(spec, trained), hardware.free_disk(saves)
    if needed > free:
        return [problem("disk-full", folder=saves, needed=f"{needed / 1e9:.2f} GB", free=f"{free / 1e9:.2f} GB")]
    return []


def disk_needed(spec: RunSpec, trained: int) -> int:
    """The minimum number of bytes that a run with `trained` weights writes, all in fp32: checkpoints with Adam's two
    moments, and the result.

    A run that keeps all its checkpoints is counted with three.
    """
    checkpoints = (spec.logging.save_total_limit or 2) + 1
    return 4 * trained * (3 * checkpoints + 1) + 20_000_000
