"""A run as its folder shows it at one moment: its state, who submitted it, how it ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Refusal, problem, sentences
from engine.core.rundir import WAITING_FOR_SPACE, RunDir, read_object, stamp
from engine.export import gguf
from engine.runs import kinds
from engine.runs.facts import RunFacts, read_facts
from engine.runs.life import life
from engine.spec.run_spec import Spec

ALIVE_STATES = ("preparing", "running", "stopping")
FINAL_STATES = ("finished", "stopped", "failed", "interrupted")
# Errors that count as an unreadable file: the run is shown as failed, and the others are not affected.
DAMAGED_REQUEST = {
    "kind": "training",
    "by": "",
    "submitted": 0.0,
    "attempt": 1,
    "stop": None,
    "damaged": True,
}
DAMAGED_EXIT = {
    "outcome": "failed",
    "reason": "run-damaged",
    "code": None,
    "signal": None,
    "attempt": 0,
    "ended": None,
}


@dataclass(frozen=True)
class Run:
    """One run as its folder showed it at one moment."""

    id: str  # model/method/run id, as inside the saves folder
    path: Path
    state: str
    request: dict[str, Any]
    exit: dict[str, Any] | None
    known: RunFacts | None = None  # if they have been read before and cannot have changed

    @property
    def dir(self) -> RunDir:
        return RunDir(self.path)

    @property
    def kind(self) -> str:
        """A key of `engine.runs.kinds.KINDS`."""
        return self.request.get("kind", "training")

    @property
    def spec(self) -> Any:
        """A RunSpec, or the spec of the run's kind; read each time, since a list of runs does not hold thousands of
        them. Raises Refusal."""
        return _spec(self.dir.spec, stamp([self.dir.spec]))

    @cached_property
    def facts(self) -> RunFacts:
        """What lists show of it, read from its files at the first access."""
        return self.known or read_facts(self.dir, self.kind)

    @property
    def title(self) -> str:
        return self.facts.name or self.path.name

    @property
    def by(self) -> str:
        return self.request["by"]

    @property
    def submitted(self) -> float:
        return self.request["submitted"]

    @property
    def started(self) -> float | None:
        return read_object(self.dir.keeper).get("started")

    @property
    def ended(self) -> float | None:
        return self.exit["ended"] if self.exit else None

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def can(self) -> set[str]:
        """The actions that are possible in this state."""
        if self.state in ALIVE_STATES:
            return {"stop", "kill", "clone"}
        if self.state == "queued":
            return {"kill", "clone", "delete"}
        # A finished export may lack its GGUF file: then only that step remains.
        left = self.state != "finished" or (self.kind == "export" and gguf.can_be_tried_again(self.dir))
        imported = bool(self.request.get("imported"))  # without checkpoints of ours
        return {"clone", "delete"} | ({"resume"} if left and not imported else set())


@lru_cache(maxsize=1024)
def _spec(path: Path, _stamp: str) -> Spec:
    try:
        return kinds.read(regular_files.read_text(path))
    except (OSError, UnicodeDecodeError):
        raise Refusal(problem("run-file-damaged", file=path.name, run=path.parent.name)) from None


def _request_of(run: RunDir) -> dict[str, Any]:
    """request.json; if it is damaged, what is known without it, and {} if there is none."""
    request = read_object(run.request)
    kind = request.get("kind", "training")
    right = isinstance(request.get("submitted"), (int, float)) and isinstance(request.get("by", ""), str)
    if right and isinstance(kind, str) and kind in kinds.KINDS:
        return {"by": "", "attempt": 1, **request}
    return DAMAGED_REQUEST | {"submitted": _changed(run.path)} if os.path.lexists(run.request) else {}


def _exit_of(run: RunDir) -> dict[str, Any] | None:
    """exit.json, None if there is none. A run with a damaged one, or with a damaged request and no start, has
    failed."""
    exit = read_object(run.exit)
    if exit.get("outcome") in FINAL_STATES and isinstance(exit.get("ended"), (int, float)):
        reason = exit.get("reason", exit["outcome"])
        known = reason if exit["outcome"] != "failed" or f"failure-{reason}" in sentences() else DAMAGED_EXIT["reason"]
        return {"code": None, "signal": None, **exit, "reason": known}
    damaged = os.path.lexists(run.exit) or (_request_of(run).get("damaged") and not run.alive())
    return DAMAGED_EXIT if damaged else None  # nobody knows when it ended


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted in the meantime
        return 0.0


def state(run: RunDir) -> str:
    """The state according to the folder: see docs/architecture.md."""
    return _observed(run)[0]


def _observed(run: RunDir) -> tuple[str, dict[str, Any] | None, bool]:
    """The state, the content of exit.json, and whether any process of the run was alive just before."""
    if run.on_slurm() and (exit := _exit_of(run)):
        return exit["outcome"], exit, False  # Slurm need not be asked about every run that has ended
    # In this order: a supervisor takes the lock, writes keeper.json, then exit.json, and releases the lock. Looking for
    # keeper.json only at the end could find that of a supervisor that started after the lock was checked.
    known = life(run)
    alive = known.phase == "alive"
    if exit := _exit_of(run):
        return exit["outcome"], exit, alive
    if alive:
        return _state_alive(run), None, True
    # Once more: resume removes that file before exit.json.
    return "interrupted" if known.phase == "gone" and os.path.lexists(known.begun) else "queued", None, False


def _state_alive(run: RunDir) -> str:
    if read_object(run.request).get("stop") or os.path.lexists(run.pause):
        return "stopping"
    phase = read_object(run.progress).get("phase")
    working = ("training", "evaluating", "tasks", "judging", "exporting", "saving", "converting", WAITING_FOR_SPACE)
    return "running" if phase in working else "preparing"


def read(folder: Path, saves: Path) -> Run:
    """The run in `folder` in its current state."""
    return read_with_end(folder, saves)[0]


def read_with_end(folder: Path, saves: Path) -> tuple[Run, bool]:
    """The run in `folder`, and whether it has ended for good: its exit.json is complete, and none of its processes was
    alive before that was read, so that only resume or deletion can change it."""
    run = RunDir(folder)
    state, exit, alive = _observed(run)
    request = _request_of(run)
    ended = not alive and exit not in (None, DAMAGED_EXIT) and not request.get("damaged")
    return Run(folder.relative_to(saves).as_posix(), folder, state, request, exit), ended


def sweep_of(run: Run) -> dict[str, Any]:
    """What the run's request says of its sweep; {} if it belongs to none."""
    sweep = run.request.get("sweep")
    return sweep if isinstance(sweep, dict) and isinstance(sweep.get("id"), str) else {}
