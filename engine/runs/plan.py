"""A preview of what a spec would do: rows, steps, parameters, command, and what prevents it from running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.core import hardware
from engine.core.problems import Problem, problem
from engine.core.stages import STAGES
from engine.data.datasets import read_dataset_info
from engine.data.validation import recommended
from engine.launch import command
from engine.launch.workspace import Workplace
from engine.models.discovery import identity
from engine.models.facts import inspect_model
from engine.preflight import doctor, limits, memory, memory_savers
from engine.preflight.checks import preflight_problems
from engine.preflight.model_checks import adapted_modules, model_is_readable, trained_parameters
from engine.preflight.package_checks import bitsandbytes_problems, package_doubts
from engine.preflight.remarks import remarks
from engine.preflight.strategy import strategy_reason
from engine.runs import recent
from engine.runs.compare import Difference, differences
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields
from engine.spec.steps import optimizer_steps

MEMORY_WARNING_CODES = (
    "batch-may-not-fit",
    "length-may-not-fit",
    "model-may-not-fit",
)  # `fits` says more than these
# What everybody has to choose, whatever a preset begins with.
ALWAYS_CHOSEN = ("model.model_name_or_path", "data.datasets", "data.dataset_dir")


@dataclass(frozen=True)
class Summary:
    """The plan of one run. None for what is not known yet."""

    rows: int | None  # trained on in one epoch
    steps: int | None  # optimizer steps of the whole run
    exact: bool  # whether rows and steps are exact: preparation may still pack, split or leave out rows
    trainable: int | None
    parameters: int | None
    command: list[str]
    shell: str  # the command, quoted for a shell
    yaml: str
    problems: list[Problem]
    needed: memory.MemoryNeed | None = None  # of each GPU, or of the machine
    room: memory.AvailableMemory | None = None
    fits: RunSpec | None = None  # the spec, changed if it needs too much memory; None if no change helps
    # Parts of bitsandbytes ("4bit", "8bit", "optimizer") that do not work on the devices of the run, whether chosen or
    # not; None while this is being tried.
    unusable: Mapping[str, Problem] | None = field(default_factory=dict)
    doubts: list[Problem] = field(default_factory=list)  # that do not prevent a start, without memory: see `fits`
    remarks: list[Problem] = field(default_factory=list)  # remarks about the data that are not obstacles
    # Modules that get an adapter: short name → number; empty for other methods.
    adapted: Mapping[str, int] = field(default_factory=dict)
    strategy: Problem | None = None  # how several processes divide the training, and why; None for one process


def first_preset(workplace: Workplace) -> str:
    """The initial preset of the form: the first for the model used last, otherwise one for any model; the demo, whose
    model and data are always available, if nothing was used yet."""
    used = recent.model_used_last(workplace, recent.models(workplace))
    if used is None:
        return "demo"
    model = identity(str(used.path))
    own = (name for name in workplace.presets() if identity(workplace.preset(name).model.model_name_or_path) == model)
    return next(own, "lora_7b")


def start_from(workplace: Workplace, preset: str) -> tuple[RunSpec, Problem | None]:
    """A preset adapted to this workplace: missing data sets are replaced by the first suitable one, or by none, which
    the second value reports. A preset for any model gets the initial model, unless that is the demo."""
    spec = workplace.preset(preset)
    model = None if spec.model.model_name_or_path else recent.first_model(workplace)
    if model and not recent.is_demo(model):
        spec = spec.change("model.model_name_or_path", str(model.path))
    catalogue = read_dataset_info(workplace.data)[0]
    there = {dataset.name for dataset in catalogue}
    missing = [name for name in spec.data.datasets if name not in there]
    if not missing:
        return spec, None
    instead = recommended(catalogue, STAGES[spec.stage.kind].form)[:1]
    gone = {"names": ", ".join(missing), "folder": workplace.data}
    notice = problem("preset-other-data", instead=instead[0], **gone) if instead else problem("preset-no-data", **gone)
    return spec.change("data.datasets", instead), notice


def refitted(spec: RunSpec, workplace: Workplace) -> tuple[RunSpec, Problem | None]:
    """A spec whose only data set does not suit its stage, with the first that does, which the second value reports. If
    several are chosen, or none is suitable, it stays unchanged."""
    fitting = recommended(read_dataset_info(workplace.data)[0], STAGES[spec.stage.kind].form)
    chosen = list(spec.data.datasets)
    if len(chosen) != 1 or chosen[0] in fitting or not fitting:
        return spec, None
    notice = problem("stage-other-data", name=chosen[0], instead=fitting[0])
    return spec.change("data.datasets", fitting[:1]), notice


def defaults_for(spec: RunSpec, start: RunSpec) -> RunSpec:
    """`start`, but of the kinds that `spec` has: where these differ, their settings have the declared defaults."""
    plain = start.model_dump()
    for path in SPEC_CHOICES:
        *parents, last = path.split(".")
        part: Any = plain
        chosen: Any = spec
        for parent in parents:
            part, chosen = part[parent], getattr(chosen, parent)
        kind = getattr(chosen, last).kind
        if part[last]["kind"] != kind:
            part[last] = {"kind": kind}
    return RunSpec.read(plain)


def changed_settings(spec: RunSpec, start: RunSpec) -> list[Difference]:
    """The settings of `spec` that differ from those of the spec that the form began with, in the order of declaration:
    values before and now. Of a kind that has been chosen since then, those that differ from the declared defaults.
    Without the choice of model and data sets."""
    kinds = {change.path: change for change in differences([start, spec]) if change.path in SPEC_CHOICES}
    inside = {change.path: change for change in differences([defaults_for(spec, start), spec])}
    return [
        change for path in fields() if path not in ALWAYS_CHOSEN and (change := kinds.get(path) or inside.get(path))
    ]


def summary(spec: RunSpec, workplace: Workplace) -> Summary:
    """Everything that the page shows next to the Start button. Never waits: what is still being tried on this machine
    is shown once it is known (`engine.preflight.doctor`)."""
    spec = workplace.frozen(spec)
    gpus = hardware.planned_gpus()
    gpu_count = len(gpus)
    folder = "saves/…"
    training = command.train_command(spec, folder, 0, gpu_count)
    broken = bitsandbytes_problems(doctor.device_of(spec), wait=False)  # first: known results are also reported below
    all_problems = preflight_problems(spec, workplace, wait=False)
    wrong = {obstacle.field for obstacle in all_problems}
    # A folder outside this installation is not read, not even to count.
    counted = None if "data.dataset_dir" in wrong else limits.row_counts(spec)
    rows = counted.total if counted else None
    model = inspect_model(spec.model.model_name_or_path) if model_is_readable(wrong) else None
    measured = spec.change("data.datasets", []) if "data.dataset_dir" in wrong else spec
    need = memory.memory_needed(measured, model, gpu_count) if model and "stage.reward_model" not in wrong else None
    room, data = memory.available_memory(spec), spec.data
    all_problems = spec_problems(spec) + all_problems
    all_problems += limits.limit_problems(spec, workplace, all_problems)
    warnings = limits.limit_warnings(spec, all_problems) + package_doubts(spec)
    return Summary(
        rows=rows,
        steps=optimizer_steps(spec, rows) if rows else None,
        exact=not (spec.stage.kind == "pt" or data.packing or data.skip_bad_rows or data.too_long == "drop"),
        trainable=trained_parameters(spec) if model else None,
        parameters=model.parameters if model else None,
        adapted=adapted_modules(spec) if model else {},
        command=training,
        shell=command.shell_command(training, command.environment(spec, folder, gpus, hardware.threads())),
        yaml=spec.to_yaml(brief=True),
        problems=all_problems,
        doubts=[doubt for doubt in warnings if doubt.code not in MEMORY_WARNING_CODES],
        needed=need,
        room=room,
        fits=memory_savers.fit_to_memory(measured, model, gpu_count, room.bytes, without=broken or ())
        if model and need and room
        else None,
        strategy=strategy_reason(measured, model, gpu_count) if spec.hardware.num_processes > 1 else None,
        unusable=broken,
        remarks=[] if "data.dataset_dir" in wrong else remarks(spec),
    )
