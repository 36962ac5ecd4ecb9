"""The launcher of a standby: it imports the libraries of a training before there is a run, and is handed one later."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.core import hardware
from engine.core.hardware import Gpu
from engine.core.leases import HELD_VARIABLE
from engine.core.locks import try_lock
from engine.core.rundir import ALIVE_BYTE, RunDir
from engine.launch import command, handover
from engine.launch.command import Step
from engine.launch.workspace import PROJECT
from engine.preflight.package_checks import trains_quantized
from engine.spec.run_spec import RunSpec

ANSWER_SECONDS = 5.0  # while a large library is being loaded, the launcher does not answer for a second


def standby_step(spec: RunSpec, gpus: Sequence[Gpu], threads: int) -> Step:
    """The launcher of a training whose folder and port are not known yet, with everything that it can only have from
    its start. So a launcher can be handed any run whose step is equal."""
    step = command.training_steps(spec, Path(handover.PLACE), 0, len(gpus))[-1]
    imports = {"stage": spec.stage.kind, "quantizes": trains_quantized(spec)}
    variables = command.environment(spec, handover.PLACE, gpus, threads) | dict(step.environment)
    own = {command.WAIT_VARIABLE: "1", command.STANDBY_VARIABLE: json.dumps(imports), HELD_VARIABLE: ""}
    return replace(step, environment=variables | own)


class StandbyLauncher:
    """A launcher without a run. It ends when this process ends."""

    def __init__(self, step: Step):
        self.step = step
        self.channel, end = socket.socketpair()
        output = os.memfd_create("standby")  # the launcher copies it to the log of its run
        with end:
            self.process = subprocess.Popen(
                step.arguments,
                env=command.inherited_environment() | dict(step.environment),
                cwd=PROJECT,
                stdin=end.fileno(),
                stdout=output,
                stderr=output,
            )
        os.close(output)

    def wait_for_run(self, studio: socket.socket, idle_seconds: float) -> tuple[str, list[str], int]:
        """The folder that the studio hands over, the UUIDs of its GPUs, and the descriptor of the queue's lock. Raises
        EOFError if the launcher or the studio has ended, TimeoutError if the studio has sent nothing for so many
        seconds."""
        while True:
            ready = select.select([studio, self.channel], [], [], idle_seconds)[0]
            if not ready:
                raise TimeoutError
            if self.channel in ready:  # it sends nothing before it has a run
                raise EOFError
            message, descriptors = handover.receive(studio)
            if "run" in message:
                return message["run"], message["gpus"], descriptors[0]

    def fits(self, spec: RunSpec, gpus: Sequence[Gpu]) -> bool:
        """Whether it is what would be started for a run of `spec` on these GPUs now."""
        return self.step == standby_step(spec, gpus, hardware.threads())

    def hand_over(
        self, run: RunDir, step: Step, environment: dict[str, str], leases: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """Make it the launcher of `run`, as if it had been started with `step`, `environment` and these descriptors of
        leases. Returns its process, which waits for its turn like any other; None, and it has ended, if it does not
        answer."""
        lock = try_lock(run.lock, ALIVE_BYTE, shared=True)
        assert lock is not None  # nobody locks this byte exclusively
        try:
            self.channel.settimeout(ANSWER_SECONDS)
            own = self.step.environment
            changed = {name: value for name, value in environment.items() if own.get(name, value) != value}
            message = {"folder": str(run.path), "arguments": step.arguments[3:], "environment": changed}
            handover.send(self.channel, message, [lock, 1, *leases])
            handover.receive(self.channel)
        except (OSError, EOFError, ValueError):
            self.end()
            return None
        finally:
            os.close(lock)
        self.channel.settimeout(None)
        self.process.stdin = self.channel.makefile("wb")
        self.channel.close()
        return self.process

    def end(self) -> None:
        """End it. It has no children."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.channel.close()
