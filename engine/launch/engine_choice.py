"""Which engine starts the runs of a saves folder, as the operator has chosen it in its engine.yaml.

The file is part of the saves folder, so that every studio and every shell command there use the same engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from engine.core import hardware, regular_files
from engine.core.hardware import Gpu, Node
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import stamp, write_text
from engine.spec.parts import Part
from engine.spec.yaml_text import read_yaml

FILE = "engine.yaml"
EngineName = Literal["local", "slurm"]
ENGINES = get_args(EngineName)
# Options of sbatch that the engine itself sets.
RESERVED_OPTIONS = (
    "array", "chdir", "clusters", "export", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode",
    "output", "parsable", "requeue", "signal", "wait", "wrap",
)  # fmt: skip


class EngineChoice(Part):
    """The engine and, for Slurm, what to tell it. GPUs, memory and cores are those of each machine of the partition:
    the machine that submits says nothing about them. `chats`: where chat servers compute; None: where runs do."""

    engine: EngineName = "local"
    partition: str = ""
    account: str = ""
    sbatch: list[str] = Field(default_factory=list, max_length=100)  # further options, such as --qos=high
    gpus_per_machine: int = Field(default=0, ge=0, le=64)
    gpu_memory_gb: float = Field(default=0.0, ge=0.0, le=10_000.0)  # 0: unknown, so that no memory is estimated
    gpu_name: str = "GPU"
    memory_gb: float = Field(default=0.0, ge=0.0, le=100_000.0)  # 0: unknown, like the cores
    cores: int = Field(default=0, ge=0, le=10_000)
    # Before the time limit or a preemption: for a step, a validation and a checkpoint. Slurm has 16 bits for it.
    warning_seconds: int = Field(default=120, ge=10, le=65535)
    chats: EngineName | None = None
    chat_sbatch: list[str] = Field(default_factory=list, max_length=100)  # of chat servers, after those of all jobs
    chat_servers: int = Field(default=2, ge=1, le=1000)  # at once: each holds a whole model

    @property
    def chats_on_slurm(self) -> bool:
        """Whether chat servers are jobs of Slurm."""
        return (self.chats or self.engine) == "slurm"

    def node(self) -> Node:
        """One of the machines, as far as it is known here."""
        size = int(self.gpu_memory_gb * 1e9)
        gpus = (Gpu(index, f"GPU-{index}", self.gpu_name, size, size, 0.0) for index in range(self.gpus_per_machine))
        return Node(tuple(gpus), int(self.memory_gb * 1e9) or None, self.cores or None)


def read_choice(saves: Path) -> EngineChoice:
    """The choice for a saves folder; the local engine where there is no file. Raises Refusal."""
    return _read(saves / FILE, stamp([saves / FILE]))


def is_local(saves: Path) -> bool:
    """Whether runs are started on this machine; False if the choice cannot be read."""
    try:
        return read_choice(saves).engine == "local"
    except Refusal:
        return False


def chats_stay_here(saves: Path) -> bool:
    """Whether chat servers compute on this machine although runs do not; False if the choice cannot be read."""
    try:
        choice = read_choice(saves)
    except Refusal:
        return False
    return choice.engine != "local" and not choice.chats_on_slurm


def planned_node(saves: Path) -> Node | None:
    """The machines that the runs of a saves folder compute on, as its engine.yaml describes them now; None: this one.
    While the file is wrong, which is a problem of every run, nothing is known of them."""
    try:
        choice = read_choice(saves)
    except Refusal:
        return Node()
    return choice.node() if choice.engine == "slurm" else None


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: str) -> EngineChoice:
    try:
        text = regular_files.read_text(path)
    except FileNotFoundError:
        return EngineChoice()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(problem("engine-file-unreadable", file=path, why=error)) from None
    try:
        choice = EngineChoice.read(read_yaml(text) or {})
    except Refusal as refusal:
        details = {language: refusal.text(language) for language in ("en", "zh")}
        raise Refusal(problem("engine-file-wrong", file=path, details=details)) from None
    if wrong := [option for option in (*choice.sbatch, *choice.chat_sbatch) if not _is_allowed(option)]:
        raise Refusal(problem("engine-sbatch-option", file=path, option=wrong[0], reserved=", ".join(RESERVED_OPTIONS)))
    return choice


def _is_allowed(option: str) -> bool:
    """Whether it is one long option of sbatch, and none that the engine sets itself, abbreviated or not."""
    name = option.removeprefix("--").partition("=")[0]
    reserved = any(taken.startswith(name) for taken in RESERVED_OPTIONS)
    return option.startswith("--") and option.isprintable() and bool(name) and not reserved


def settle_choice(saves: Path, name: str | None) -> Problem | None:
    """Make `name`, from the command line, the engine of a saves folder that has no choice yet, and plan runs for the
    machines of its engine from now on, whatever the file says by then. Returns a note if the file was written. Raises
    Refusal if the folder has another engine, or the file is wrong."""
    note = None
    if name and name not in ENGINES:
        raise Refusal(problem("spec-choice", "engine", given=name, choices=", ".join(ENGINES)))
    if name and name != read_choice(saves).engine:
        if (saves / FILE).exists():
            raise Refusal(problem("engine-other", file=saves / FILE, engine=read_choice(saves).engine, given=name))
        write_text(saves / FILE, f"engine: {name}\n")
        note = problem("engine-chosen", file=saves / FILE, engine=name)
    read_choice(saves)
    hardware.plan_for(partial(planned_node, saves))
    return note


def sbatch_options(choice: EngineChoice) -> list[str]:
    """What the operator wants every job to be submitted with."""
    named = {"partition": choice.partition, "account": choice.account}
    return [*(f"--{name}={value}" for name, value in named.items() if value), *choice.sbatch]


def cores_of_gpus(choice: EngineChoice, options: Iterable[str]) -> list[str]:
    """The share of a machine's cores that comes with each GPU of a job; nothing if it is unknown, or the operator's
    `options` ask for cores in another way. Where the cluster has no default, a job would get one core."""
    own = any(option.startswith("--cpus-per-") for option in options)
    share = choice.cores // choice.gpus_per_machine if choice.gpus_per_machine else 0
    return [f"--cpus-per-gpu={share}"] if share and not own else []
