"""The devices that an engine has given to a run, and how its processes are started on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.core import hardware
from engine.core.hardware import Gpu
from engine.core.locks import try_lock
from engine.core.problems import Refusal, problem
from engine.core.rundir import ALIVE_BYTE, RunDir
from engine.launch import command
from engine.launch.command import Step
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import Spec


class Allotted(Protocol):
    """The GPUs that an engine has given to a run, and what starts its processes there."""

    @property
    def uuids(self) -> Sequence[str]:
        """Those that are leased."""

    @property
    def descriptors(self) -> Sequence[int]:
        """What holds the leases."""

    def gpus(self, spec: Spec) -> tuple[Gpu, ...]:
        """Empty if the run uses the CPU, as was decided when it was submitted. Raises Refusal if one is not there."""

    def adapted(self, step: Step, spec: Spec) -> Step:
        """A step as it is started there."""

    def start(self, step: Step, environment: dict[str, str], run: RunDir) -> subprocess.Popen[bytes]:
        """Start a child of the run."""


@dataclass(frozen=True)
class Leased:
    """The GPUs that a supervisor has leased, in the order in which the run uses them, and the descriptors that hold
    their leases."""

    uuids: Sequence[str] = ()
    descriptors: Sequence[int] = ()

    def gpus(self, spec: Spec) -> tuple[Gpu, ...]:
        """Raises Refusal if one is not there any more."""
        if not self.uuids and spec.hardware.device != "cpu" and (failure := hardware.gpu_failure()):
            raise Refusal(failure)  # it worked when the run was submitted; "auto" does not mean the CPU now
        there = {gpu.uuid: gpu for gpu in hardware.all_gpus()}
        if lost := [uuid for uuid in self.uuids if uuid not in there]:
            raise Refusal(hardware.driver_failure() or problem("gpu-gone", "hardware.device", uuid=lost[0]))
        return tuple(there[uuid] for uuid in self.uuids)

    def adapted(self, step: Step, spec: Spec) -> Step:
        """Unchanged. Raises Refusal for a run of several machines, which this engine does not have."""
        if spec.hardware.machines > 1:
            raise Refusal(problem("machines-on-local", "hardware.num_machines", given=spec.hardware.machines))
        return step

    def start(self, step: Step, environment: dict[str, str], run: RunDir) -> subprocess.Popen[bytes]:
        """Start a child that holds the run's lock and the leases: programs that take no lock themselves must count as
        alive, too."""
        lock = try_lock(run.lock, ALIVE_BYTE, shared=True)
        assert lock is not None  # nobody locks this byte exclusively
        child = start_child(step, environment, (lock, *self.descriptors))
        os.close(lock)
        return child


NO_GPUS = Leased()


def start_child(step: Step, environment: dict[str, str], descriptors: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a child of a run. One that waits has a pipe as its standard input, which closes if the supervisor ends."""
    return subprocess.Popen(
        step.arguments,
        env=environment | dict(step.environment) | ({command.WAIT_VARIABLE: "1"} if step.waits else {}),
        cwd=PROJECT,
        stdin=subprocess.PIPE if step.waits else subprocess.DEVNULL,
        pass_fds=tuple(descriptors),
    )
