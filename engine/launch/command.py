"""A spec and its devices → the command line and environment of its processes. Pure: it starts nothing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.core.gpu_choice import BF16_CAPABILITY, lacks
from engine.core.hardware import UUIDS_VARIABLE, Gpu
from engine.core.rundir import RunDir, read_object
from engine.launch.workspace import PROJECT
from engine.models.discovery import is_hub_id
from engine.spec.run_spec import RunSpec, Spec

# Every process of a run carries this, whatever its session or group; it is used to find and end them.
RUN_VARIABLE = "ATHANOR_RUN"
WAIT_VARIABLE = "ATHANOR_WAITS"  # told to a child that should wait for a line on its standard input
STANDBY_VARIABLE = "ATHANOR_STANDBY"  # told to a launcher that has no run yet: what it should import, as JSON
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ACCELERATE_CONFIG = Path(__file__).parent / "accelerate.yaml"
SHARD_ON_CPU_VARIABLE = "ATHANOR_TEST_SHARD_ON_CPU"  # lets processes divide weights without GPUs, to try it out
PRECISION_VARIABLE = "ATHANOR_PRECISION"  # what the precision "auto" means in all processes of a run


def on_cpu(spec: Spec, gpu_count: int) -> bool:
    """Whether the run uses the CPU on a machine with this many GPUs. A run with explicit GPUs does not."""
    chosen = spec.hardware
    return chosen.device == "cpu" or (chosen.device == "auto" and gpu_count == 0 and not chosen.devices)


def can_divide_weights(spec: Spec, gpu_count: int) -> bool:
    """Whether the devices of the run can divide a model (FSDP2, ZeRO) on a machine with this many GPUs."""
    return not on_cpu(spec, gpu_count) or bool(os.environ.get(SHARD_ON_CPU_VARIABLE))


@dataclass(frozen=True)
class Step:
    """One child process of a run. A child that `waits` is started with the first, and at its turn gets a line on its
    standard input, after which it may use what the steps before it have written. A child that `saves` gets time to do
    so when it is asked to stop; others are ended immediately. `everywhere`: every machine of the run takes part."""

    arguments: list[str]
    waits: bool = False
    saves: bool = False
    everywhere: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def worker_step(module: str, folder: Path) -> Step:
    """A process of `engine.worker.<module>` on the folder of a run."""
    return Step([sys.executable, "-m", f"engine.worker.{module}", str(folder)])


def training_steps(spec: RunSpec, folder: Path, port: int, gpu_count: int) -> list[Step]:
    """Rows are tokenized before the training uses a device; meanwhile several processes try whether they can
    communicate, and the launcher imports its libraries. All downloads are finished by the time it begins."""
    training = train_command(spec, folder, port, gpu_count)
    several = spec.hardware.num_processes > 1
    flags = [f"--{name}={value}" for name, value in {"machine_rank": 0, "main_process_port": port}.items()]
    check = [sys.executable, "-m", "engine.worker.check_ranks", *flags, str(folder)]
    return [
        worker_step("prepare", folder),
        *[Step(check, waits=True, everywhere=True)] * several,
        Step(training, waits=True, saves=True, everywhere=True, environment=OFFLINE_VARIABLES),
    ]


def train_command(spec: RunSpec, folder: Path | str, port: int, gpu_count: int) -> list[str]:
    """The command that trains `spec` in `folder`: `accelerate launch`, by way of `engine.worker.launch`.

    Our own configuration is passed, because one in a user's home would otherwise change what is launched. That of
    several processes is in the run's folder (`engine.preflight.strategy`).
    """
    processes = spec.hardware.num_processes
    configuration = RunDir(Path(folder)).accelerate if processes > 1 else ACCELERATE_CONFIG
    flags = {
        "num_processes": processes,
        "num_machines": spec.hardware.num_machines,
        "machine_rank": 0,  # `engine.launch.machine` replaces it on the others
        "main_process_port": port,
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    # With --cpu, accelerate ignores the number of processes; therefore the CPU is set in the environment.
    mode = ["--cpu"] if processes == 1 and on_cpu(spec, gpu_count) else []
    return [
        sys.executable, "-m", "engine.worker.launch", "--config_file", str(configuration), *mode,
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
        "--module", "engine.worker.train", str(folder),
    ]  # fmt: skip


def environment(spec: Spec, folder: Path | str, gpus: Sequence[Gpu], threads: int) -> dict[str, str]:
    """Environment variables of the run's processes, in addition to the studio's own.

    `gpus`: those that the run can use on a machine, of which it takes the chosen or the first, and never another;
    `threads`: of a machine's CPU, for all processes of the run there.
    """
    variables = {
        RUN_VARIABLE: str(folder),
        "PYTHONPATH": python_path(),
        "PYTHONUTF8": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as numbered by nvidia-smi
        UUIDS_VARIABLE: "",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "WANDB_DIR": str(folder),
        "TENSORBOARD_LOGGING_DIR": str(Path(folder) / "tensorboard"),
        # Unless the run's accelerate.yaml says so, whatever the studio's shell does.
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_DEEPSPEED": "false",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
    }
    if on_cpu(spec, len(gpus)):
        variables |= {
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(max(threads // max(spec.hardware.processes_per_machine, 1), 1)),
            # Threads that spin while they wait for each other multiply the time where other work needs the cores.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
    else:
        by_index = {gpu.index: gpu for gpu in gpus}
        chosen = [by_index[index] for index in spec.hardware.devices if index in by_index]
        chosen = chosen or list(gpus)[: spec.hardware.processes_per_machine]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.cuda_name for gpu in chosen)
        variables[UUIDS_VARIABLE] = ",".join(gpu.uuid for gpu in chosen)
        if all(gpu.capability for gpu in chosen):  # otherwise the processes find it out
            old = any(lacks(gpu, BF16_CAPABILITY) for gpu in chosen)
            variables[PRECISION_VARIABLE] = "fp16" if old else "bf16"
    if is_hub_id(spec.model.model_name_or_path):
        variables["ATHANOR_HUB"] = spec.model.hub
    else:
        variables |= OFFLINE_VARIABLES
    return variables


def connection_variables(run: RunDir) -> dict[str, str]:
    """How the processes of this attempt can communicate (`engine.worker.check_ranks`). What an earlier one needed says
    nothing: it may have had other machines."""
    connection = read_object(run.connection)
    return connection.get("variables", {}) if connection.get("attempt") == run.attempt() else {}


def python_path() -> str:
    """The module search path of the children: here first, then as in the studio."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(PROJECT), *(path for path in others if path not in ("", str(PROJECT)))])


def shell_command(command: Sequence[str], added: Mapping[str, str]) -> str:
    """The command for pasting into a shell, with the variables that matter to it."""
    shown = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "HF_HUB_OFFLINE", "PYTHONPATH")
    words = [f"{name}={shlex.quote(added[name])}" for name in shown if name in added]
    return " ".join([*words, shlex.join(command)])


def inherited_environment() -> dict[str, str]:
    """The studio's environment for its children, without what only the studio needs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", RUN_VARIABLE))}
