"""Which strategy a training uses if it is to be chosen ("auto"), why, and the run's accelerate.yaml with both; and what
FSDP2 takes while it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import LANGUAGES, NOTHING, Problem, problem
from engine.core.rundir import RunDir, read_object, write_text
from engine.launch.accelerate_config import configuration
from engine.launch.command import on_cpu
from engine.models.facts import ModelFacts, inspect_model
from engine.preflight import memory
from engine.preflight.division import fsdp2_obstacles
from engine.spec.hardware_settings import Fsdp2
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import NAMES

FIELD = "hardware.strategy"


def strategy_reason(spec: RunSpec, model: ModelFacts | None, gpu_count: int) -> Problem:
    """Why the run has the strategy that it has (`engine.preflight.memory.with_strategy`), as a sentence with a code.
    `model`: None if it is not on this machine yet."""
    chosen = memory.with_strategy(spec, model, gpu_count)
    sharding = _sharding_reason(spec, chosen, model, gpu_count)
    if spec.hardware.strategy.kind != "auto":
        return problem("strategy-as-set", FIELD, strategy=NAMES[chosen.hardware.strategy.kind], sharding=sharding)
    if spec.hardware.num_processes == 1:
        return problem("strategy-one-process", FIELD)
    if on_cpu(spec, gpu_count):
        return problem("strategy-on-cpu", FIELD)
    room = memory.available_memory(spec)
    plain = chosen.change(FIELD, {"kind": "ddp"})
    needed = memory.memory_needed(plain, model, gpu_count) if model else None
    if room is None and hardware.plans_elsewhere():
        return problem("strategy-decided-there", FIELD)
    if needed is None or room is None:
        return problem("strategy-without-estimate", FIELD)
    values = {"needed": memory.size_text(needed.total), "there": memory.size_text(room.bytes)}
    if needed.total <= room.bytes:
        return problem("strategy-fits", FIELD, **values)
    assert model  # there is an estimate
    if obstacles := fsdp2_obstacles(spec, model):
        return problem("strategy-excluded", FIELD, **values, why=_in_each_language(obstacles[0]))
    divided = memory.memory_needed(chosen, model, gpu_count)
    assert divided
    return problem("strategy-divided", FIELD, **values, less=memory.size_text(divided.total), sharding=sharding)


def _sharding_reason(spec: RunSpec, chosen: RunSpec, model: ModelFacts | None, gpu_count: int) -> Any:
    """Among which GPUs FSDP2 divides the model on several machines, and why: a sentence in each language; NOTHING on
    one machine, and without FSDP2. `chosen`: the spec with what "auto" means."""
    strategy, hardware_chosen = chosen.hardware.strategy, chosen.hardware
    if not isinstance(strategy, Fsdp2) or hardware_chosen.machines == 1:
        return NOTHING
    if strategy.sharding == "hybrid":
        counts = {"machines": hardware_chosen.machines, "processes": hardware_chosen.processes_per_machine}
        return _in_each_language(problem("sharding-hybrid", FIELD, **counts))
    if getattr(spec.hardware.strategy, "sharding", "auto") == "full":
        return _in_each_language(problem("sharding-full", FIELD))
    if not hardware_chosen.can_be_hybrid:
        return _in_each_language(problem("sharding-single-gpus", FIELD))
    room = memory.available_memory(spec)
    hybrid = chosen.change(f"{FIELD}.sharding", "hybrid")
    needed = memory.memory_needed(hybrid, model, gpu_count) if model else None
    if room is None and hardware.plans_elsewhere():
        return _in_each_language(problem("sharding-decided-there", FIELD))
    if needed is None or room is None:
        return _in_each_language(problem("sharding-without-estimate", FIELD))
    values = {"needed": memory.size_text(needed.total), "there": memory.size_text(room.bytes)}
    return _in_each_language(problem("sharding-does-not-fit", FIELD, **values))


def _in_each_language(sentence: Problem) -> dict[str, str]:
    return {language: sentence.text(language) for language in LANGUAGES}


def write_configuration(spec: RunSpec, folder: Path, gpu_count: int) -> None:
    """Write accelerate.yaml for a run of several processes that is about to start. A run with a checkpoint continues
    with the strategy that it has, which that depends on. Without one, it is chosen again: by now, a model from a hub
    may have been downloaded."""
    run = RunDir(folder)
    if spec.hardware.num_processes == 1 or (run.accelerate.exists() and run.checkpoints()):
        return
    downloaded = read_object(run.prepared / "summary.json").get("model_path")
    spec = spec.change("model.model_name_or_path", downloaded or spec.model.model_name_or_path)
    path = Path(spec.model.model_name_or_path)
    model = inspect_model(path) if path.is_dir() else None
    chosen = memory.with_strategy(spec, model, gpu_count)
    reason = strategy_reason(spec, model, gpu_count)
    if spec.hardware.strategy.kind == "auto" and run.checkpoints():  # of a version that had DDP only
        chosen, reason = spec.change(FIELD, "ddp"), problem("strategy-as-before", FIELD)
    write_text(run.accelerate, configuration(chosen.hardware, f"{reason.text()}\n{reason.text('zh')}"))


def loading_warnings(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """With FSDP2, every process reads the whole model into the main memory of its machine before it is divided."""
    needed, there = main_memory_needed(spec, model), hardware.planned_memory()
    if there is None or needed <= there:
        return []
    values = {
        "processes": spec.hardware.processes_per_machine,
        "needed": memory.size_text(needed),
        "there": memory.size_text(there),
    }
    return [problem("fsdp2-main-memory", "hardware.strategy", **values)]


def main_memory_needed(spec: RunSpec, model: ModelFacts) -> float:
    """Bytes of a machine's main memory that the model takes before it is divided; 0 if it is not divided there."""
    gpu_count = len(hardware.planned_gpus())
    strategy = memory.with_strategy(spec, model, gpu_count).hardware.strategy
    if not isinstance(strategy, Fsdp2) or spec.model.quantization.kind != "none":
        return 0.0
    return spec.hardware.processes_per_machine * memory.weight_bytes(spec, model, gpu_count)
