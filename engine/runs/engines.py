"""The engines that start runs: on this machine, or through Slurm. A choice is a table of functions.

What an engine knows of a run's processes is in `engine.runs.life`, on which the state of a run depends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.core.locks import is_locked
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import SUPERVISED_BYTE, RunDir
from engine.launch import command
from engine.launch.engine_choice import read_choice
from engine.launch.processes import find_processes, wake_supervisor
from engine.launch.workspace import PROJECT
from engine.runs import index, notify, queue, slurm_queue
from engine.runs.life import life
from engine.runs.queue import HandOver, Place
from engine.runs.run import Run
from engine.runs.schedule import Decision


@dataclass(frozen=True)
class Engine:
    """`advance` starts the waiting runs of a saves folder that can start; `place` tells why one waits; `end` carries
    out a stop request: (run, "save" or "kill", whether the run was waiting); `withdraw` forgets a waiting run; `left`
    is the problem that an attempt that has ended still has processes; `reorder` carries out a change of a waiting run's
    turn that is in its request (`queue_order`)."""

    advance: Callable[[Path, HandOver], None]
    place: Callable[[Run], Place | None]
    end: Callable[[Run, str, bool], None]
    withdraw: Callable[[RunDir], None]
    left: Callable[[RunDir], Problem | None]
    reorder: Callable[[RunDir, str], None]


def _advance_here(saves: Path, hand_over: HandOver) -> None:
    queue.advance(saves, hand_over)


def _end_here(run: Run, how: str, waited: bool) -> None:
    """The supervisor sees the request. If it is gone but a process of the run is alive, another process ends that."""
    if waited:
        return
    if is_locked(run.dir.lock, SUPERVISED_BYTE):
        wake_supervisor(run.dir)
    elif how == "kill":
        subprocess.Popen(
            [sys.executable, "-m", "engine.runs.supervisor", "end", str(run.path)],
            cwd=PROJECT,
            env=command.inherited_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _left_here(run: RunDir) -> Problem | None:
    pids = ", ".join(str(process.pid) for process in find_processes(run.path))
    return problem("run-still-there", pids=pids) if pids else None


ENGINES = {
    "local": Engine(_advance_here, queue.place, _end_here, lambda _run: None, _left_here, lambda _run, _change: None),
    "slurm": Engine(
        slurm_queue.advance,
        slurm_queue.place,
        slurm_queue.end,
        slurm_queue.withdraw,
        slurm_queue.left,
        slurm_queue.reorder,
    ),
}


def engine_of(run: RunDir) -> Engine:
    """The engine that has the run or, of one that waits, will have it. Raises Refusal if engine.yaml is wrong."""
    if run.on_slurm():
        return ENGINES["slurm"]
    has_begun = os.path.lexists(run.keeper) or run.alive()
    return ENGINES["local" if has_begun else read_choice(queue.saves_of(run.path)).engine]


def advance(saves: Path, hand_over: HandOver = queue.not_handed_over) -> None:
    """Start every waiting run that can start, and what notifies owners of runs. Raises Refusal if engine.yaml is
    wrong."""
    ENGINES[read_choice(saves).engine].advance(saves, hand_over)
    notify.look(saves)


def place(run: Run) -> Place | None:
    """Why a run waits; None if it does not."""
    if run.state != "queued":
        return None
    try:
        return engine_of(run.dir).place(run)
    except Refusal as refusal:  # engine.yaml is wrong
        return Place(None, Decision(reason=refusal.problems[0]))


def waiting(saves: Path) -> list[tuple[Run, Place]]:
    """The waiting runs, as far as possible in their order, and why each waits. Raises Refusal if engine.yaml is
    wrong."""
    decisions = queue.decisions(saves) if read_choice(saves).engine == "local" else []
    ordered = [(run, Place(number, decision)) for number, (run, decision) in enumerate(decisions, start=1)]
    others = {run.path for run, _ in ordered}
    unordered = (run for run in index.open_runs(saves) if run.path not in others)
    return ordered + [(run, where) for run in unordered if (where := place(run))]


def doubt(run: Run) -> Problem | None:
    """Why the state of a run may be out of date."""
    return None if run.final or not run.dir.on_slurm() else life(run.dir).doubt
