"""The studio's standby: a supervisor without a run, whose launcher imports the libraries of a training in advance.

Started while somebody looks at a form that is ready, it takes the seconds of the imports from the time between the
start of a run and its first step. There is at most one per studio, and it holds no lock and no device. It ends with the
studio; after two minutes in which nobody has looked; at once if its studio starts a run that it does not fit; and
within two seconds (a tick of the studio) if a run is resumed, or started by anybody else. Whatever goes wrong, the run
starts as ever, in processes of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from engine.core import hardware, regular_files
from engine.core.hardware import Gpu
from engine.core.locks import is_locked
from engine.core.rundir import SUPERVISED_BYTE, RunDir, stamp
from engine.launch import handover
from engine.launch.command import Step
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight.machine import Finding
from engine.runs import engines, kinds, queue
from engine.runs.standby_launcher import standby_step
from engine.spec.run_spec import RunSpec

IDLE_SECONDS = 120.0  # without a look at a form that is ready
LOOK_SECONDS = 25.0  # for which a look counts: while somebody looks, there is one every 20 s (`LOOK_MS` in page.js)
ANSWER_SECONDS = 8.0  # until its supervisor holds the lock of the run; it may have just been started
LOW_MEMORY_BYTES = 2 << 30  # of available memory; with less, there is no standby
RETRY_SECONDS = 600.0  # after one has ended by itself, such as for lack of memory

_enabled = False
_turn = threading.Lock()
_standby: Standby | None = None
_not_before = 0.0  # monotonic time


def enable() -> None:
    """Allow this process to have a standby: only a studio does."""
    global _enabled
    _enabled = True


def offer(spec: RunSpec, workplace: Workplace, viewer: str = "") -> bool:
    """Somebody is looking at a form that is ready to start `spec`. Returns immediately: whether there is a standby for
    it. As long as another `viewer` looks at a form that needs another one, that one stays."""
    global _standby, _not_before
    if not _enabled:
        return False
    spec = workplace.frozen(spec)
    step = _step(spec, queue.gpus_for(spec, kinds.training_memory(spec)))
    with _turn, contextlib.suppress(OSError):
        if _standby and _standby.has_ended():
            _not_before = 0 if _standby.is_idle() else time.monotonic() + RETRY_SECONDS
            _standby = None
        if _standby and (queue.is_occupied(workplace.saves) or not _standby.notice_look(step, viewer)):
            _standby.end()
            _standby = None
        # A run that waits now is about to start: it may even be this studio's, on its way to a standby.
        if _standby is None and _is_possible(spec) and not queue.is_busy(workplace.saves):
            _standby = Standby(step, viewer)
        return _standby is not None and _standby.step == step
    return False


def tick(saves: Path) -> None:
    """Let the queue move on, and end the standby if a run is alive that has been started elsewhere."""
    global _standby
    engines.advance(saves, hand_over)
    with _turn:
        if _standby and queue.is_occupied(saves):
            _standby.end()
            _standby = None


def _is_possible(spec: RunSpec) -> bool:
    """Whether a standby is of use for `spec`, and there is memory for it."""
    waits = time.monotonic() < _not_before
    if waits or hardware.plans_elsewhere():
        return False
    return spec.hardware.num_processes == 1 and hardware.memory()[0] >= LOW_MEMORY_BYTES


def hand_over(run: RunDir, lock: int, gpus: Sequence[Gpu]) -> bool:
    """Let the standby have a run that starts now, if there is one and it fits; otherwise it ends, since the run needs
    the memory. `lock`: the descriptor of the queue's lock. Returns whether the run has a supervisor. Raises nothing: an
    error is printed, and the run starts as if there had been no standby."""
    global _standby
    with _turn:
        standby, _standby = _standby, None
    if standby is None:
        return False
    try:
        spec = kinds.read(regular_files.read_text(run.spec))
        if isinstance(spec, RunSpec) and standby.fits(_step(spec, gpus)):
            return standby.take(run, lock, gpus)
    except Exception:  # if the run has it, too, its own supervisor will report it
        traceback.print_exc()
    standby.end()
    return False


def findings() -> Iterator[Finding]:
    """The memory of the standby, for the report about this machine."""
    with _turn:
        memory = _standby.memory() if _standby else 0
    if memory:
        yield Finding("good", "machine-standby", {"size": f"{memory / 1e6:,.0f} MB"})


def _step(spec: RunSpec, gpus: Sequence[Gpu]) -> Step:
    return standby_step(spec, gpus, hardware.threads())


def code_stamp() -> str:
    """A value that changes with the code that a new process would load: ours, and the installed packages."""
    ours = sorted((PROJECT / "engine").rglob("*.py"))
    return stamp([*ours, *(folder for folder in sys.path if os.path.isdir(folder) and folder != str(PROJECT))])


class Standby:
    """A standby from its start until it is handed a run or ends."""

    def __init__(self, step: Step, viewer: str = ""):
        """Start it. Returns before it has begun."""
        self.step, self.code = step, code_stamp()
        self.looks = {viewer: time.monotonic()}  # the newest of each viewer who may still be looking
        self.process: psutil.Process | None = None  # known once it has reported itself
        self.channel, end = socket.socketpair()
        self.channel.settimeout(ANSWER_SECONDS)
        with end:
            self.starter = subprocess.Popen(
                queue.supervisor_command(handover.PLACE),
                cwd=PROJECT,
                env=queue.supervisor_environment(),
                stdin=end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        threading.Thread(target=self.starter.wait, daemon=True, name="standby").start()  # avoids a zombie
        handover.send(self.channel, {"step": asdict(step), "idle_seconds": IDLE_SECONDS})

    def fits(self, step: Step) -> bool:
        """Whether it is what would be started now for a run with that step."""
        return step == self.step and code_stamp() == self.code

    def notice_look(self, step: Step, viewer: str) -> bool:
        """A viewer looks at a form that needs `step`: if that is this one, let it wait for another two minutes. Returns
        False if nobody needs it any more. Raises OSError if it has ended."""
        now = time.monotonic()
        others = {
            other: looked for other, looked in self.looks.items() if other != viewer and looked > now - LOOK_SECONDS
        }
        if self.fits(step):
            self.looks = others | {viewer: now}
            handover.send(self.channel, {"look": True})
        elif self.step == step or not others:  # with other code on disk, it is of no use to anybody
            return False
        else:
            self.looks = others
        return True

    def has_ended(self) -> bool:
        """Whether its supervisor is gone, so that the other end of the channel is closed."""
        poll = select.poll()
        poll.register(self.channel, 0)  # POLLHUP is reported even so
        return bool(poll.poll(0))

    def is_idle(self) -> bool:
        """Whether nobody has looked for so long that it ends by itself."""
        return time.monotonic() > max(self.looks.values()) + IDLE_SECONDS

    def take(self, run: RunDir, lock: int, gpus: Sequence[Gpu]) -> bool:
        """Hand it a run on these GPUs. Returns whether the run has a supervisor; if not, the standby is gone."""
        try:
            self._reported()
            handover.send(self.channel, {"run": str(run.path), "gpus": [gpu.uuid for gpu in gpus]}, [lock])
            handover.receive(self.channel)  # it holds the lock of the run
            return True
        except Exception as error:
            if not isinstance(error, (OSError, EOFError, psutil.Error)):  # it has ended, or does not answer
                traceback.print_exc()
            if is_locked(run.lock, SUPERVISED_BYTE):
                return True
            self._kill()  # it may hang, with the lock of the queue
            return False
        finally:
            self.channel.close()

    def end(self) -> None:
        """Let it end: it does so when the channel is closed."""
        self.channel.close()

    def memory(self) -> int:
        """The memory of its processes in bytes (proportional set size); 0 if it has none."""
        try:
            process = self._reported()
            members = [process, *process.children(recursive=True)]
            return sum(member.memory_full_info().pss for member in members)
        except (OSError, EOFError, ValueError, psutil.Error):
            return 0

    def _kill(self) -> None:
        self.starter.kill()
        if self.process:
            with contextlib.suppress(psutil.Error):
                self.process.kill()

    def _reported(self) -> psutil.Process:
        """Its supervisor. Raises what `receive` raises, and psutil.Error."""
        if self.process is None:
            self.process = psutil.Process(handover.receive(self.channel)[0]["pid"])
        return self.process
