"""The kinds of runs: the spec of each, what prevents it from running, and what it starts.

Everything else about a run (queue, supervisor, lock, log, stop, resume, delete) is the same for all kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem
from engine.data import preview_client
from engine.evaluation import evaluation_memory, evaluation_spec
from engine.export import export_spec
from engine.launch.command import Step, training_steps, worker_step
from engine.launch.workspace import Workplace
from engine.models.facts import inspect_model
from engine.preflight import checks, limits, memory
from engine.preflight.package_checks import package_doubts
from engine.preflight.remarks import remarks
from engine.preflight.strategy import write_configuration
from engine.preflight.suitable_gpus import needed_capability
from engine.spec.contradictions import spec_problems
from engine.spec.explanations import UNKNOWN_KEY_CODES, unknown_last
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.yaml_text import read_yaml


@dataclass(frozen=True)
class Kind:
    """`frozen` makes every path absolute; `problems` is everything that prevents such a spec from running here; `steps`
    are its child processes in order: (spec, folder, port, number of GPUs) → steps; `doubts` are warnings that do not
    prevent a start: (spec, problems) → warnings; `memory` estimates the bytes that each of its processes takes, 0 if
    that is unknown; `capability` is the compute capability that its GPUs need, 0 if any will do."""

    spec: type[Spec]
    frozen: Callable[[Any, Workplace], Any]
    problems: Callable[[Any, Workplace], list[Problem]]
    steps: Callable[[Any, Path, int, int], list[Step]]
    doubts: Callable[[Any, list[Problem]], list[Problem]] = lambda _spec, _problems: []
    memory: Callable[[Any], int] = lambda _spec: 0
    capability: Callable[[Any], float] = lambda _spec: 0.0


def training_problems(spec: RunSpec, workplace: Workplace) -> list[Problem]:
    """Everything that prevents a training from running here: in the spec, on this machine, and in its numbers."""
    obstacles = spec_problems(spec) + checks.preflight_problems(spec, workplace)
    return unknown_last(obstacles + limits.limit_problems(spec, workplace, obstacles))


def training_doubts(spec: RunSpec, obstacles: list[Problem]) -> list[Problem]:
    """Warnings about a training's numbers, packages and data, in addition to the problems."""
    outside = any(obstacle.field == "data.dataset_dir" for obstacle in obstacles)  # a folder that cannot be accessed
    doubts = limits.limit_warnings(spec, obstacles) + package_doubts(spec)
    return doubts + ([] if outside else remarks(spec))


def _training_steps(spec: RunSpec, folder: Path, port: int, gpu_count: int) -> list[Step]:
    write_configuration(spec, folder, gpu_count)
    return training_steps(spec, folder, port, gpu_count)


def training_memory(spec: RunSpec) -> int:
    """The estimated memory of each process of a training in bytes; 0 if the model's size is unknown."""
    model = inspect_model(spec.model.model_name_or_path)
    need = memory.memory_needed(spec, model, len(hardware.planned_gpus())) if model else None
    return int(need.total) if need else 0


def training_capability(spec: RunSpec) -> float:
    """The compute capability that each GPU of a training needs."""
    model = inspect_model(spec.model.model_name_or_path)
    return needed_capability(memory.with_strategy(spec, model, len(hardware.planned_gpus())))


KINDS = {
    "training": Kind(
        RunSpec,
        lambda spec, workplace: workplace.frozen(spec),
        training_problems,
        _training_steps,
        training_doubts,
        training_memory,
        training_capability,
    ),
    "evaluation": Kind(
        evaluation_spec.EvaluationSpec,
        evaluation_spec.frozen,
        evaluation_spec.problems,
        lambda _spec, folder, _port, _gpu_count: [worker_step("evaluate", folder)],
        evaluation_memory.doubts,
        evaluation_memory.memory_needed,
    ),
    "export": Kind(
        export_spec.ExportSpec,
        export_spec.frozen,
        export_spec.problems,
        lambda _spec, folder, _port, _gpu_count: [worker_step("export", folder)],
        memory=export_spec.memory_needed,
    ),
}


@dataclass(frozen=True)
class Checked:
    """What prevents a spec from running here, settings that do not exist last; and warnings."""

    problems: list[Problem]
    doubts: list[Problem]


def check(text: str, workplace: Workplace) -> Checked:
    """Check the spec in a YAML text, and a sample of its rows, without starting it. Raises Refusal if it is none."""
    spec, unknown = read_known(text)
    kind = KINDS[spec.kind]
    spec = kind.frozen(spec, workplace)
    problems, notes = kind.problems(spec, workplace), list[Problem]()
    if not problems and isinstance(spec, RunSpec):
        problems, notes = preview_client.first_rows(spec, Path(spec.data.dataset_dir))
    problems = [*problems, *unknown]
    return Checked(problems, [*kind.doubts(spec, problems), *notes])


def read(text: str, default: str = RunSpec.kind) -> Spec:
    """The spec in a YAML text, of the kind that it states, otherwise of the kind `default`. Raises Refusal."""
    type_, plain = _type_and_settings(text, default)
    return type_.read(plain)


def read_known(text: str) -> tuple[Spec, list[Problem]]:
    """The spec in a YAML text without the settings that do not exist, and a problem for each of these. Raises Refusal
    if there are other problems."""
    type_, plain = _type_and_settings(text, RunSpec.kind)
    try:
        return type_.read(plain), []
    except Refusal as refusal:
        unknown = refusal.problems
        if not all(problem.code in UNKNOWN_KEY_CODES and _remove(plain, problem.field) for problem in unknown):
            raise
    return type_.read(plain), unknown


def _type_and_settings(text: str, default: str) -> tuple[type[Spec], Any]:
    plain = read_yaml(text)
    kind = plain.pop("kind", default) if isinstance(plain, dict) else default
    if kind not in list(KINDS):
        raise Refusal(problem("spec-choice", "kind", given=kind, choices=", ".join(KINDS)))
    return KINDS[kind].spec, plain


def _remove(plain: Any, path: str) -> bool:
    """Remove the setting at this path, its steps separated by dots; whether there was one."""
    *parts, name = path.split(".")
    for part in parts:
        plain = plain.get(part) if isinstance(plain, dict) else None
    return isinstance(plain, dict) and plain.pop(name, plain) is not plain
