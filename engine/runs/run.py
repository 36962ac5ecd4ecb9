"""A run as its folder shows it at one moment: its state, who asked for it, how it ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Refusal, problem
from engine.core.rundir import WAITING_FOR_SPACE, RunDir, read_object, stamp
from engine.export import gguf
from engine.runs import kinds
from engine.runs.facts import RunFacts, read_facts
from engine.spec.run_spec import Spec

ALIVE_STATES = ("preparing", "running", "stopping")
FINAL_STATES = ("finished", "stopped", "failed", "interrupted")
# What is taken for a file that cannot be read: the run is shown as failed, and the others are not touched by it.
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

    id: str  # model/method/run id, as below the saves folder
    path: Path
    state: str
    request: dict[str, Any]
    exit: dict[str, Any] | None
    known: RunFacts | None = None  # where they were read before and cannot have changed

    @property
    def dir(self) -> RunDir:
        return RunDir(self.path)

    @property
    def kind(self) -> str:
        """A key of `engine.runs.kinds.KINDS`."""
        return self.request.get("kind", "training")

    @property
    def spec(self) -> Any:
        """A RunSpec, or the spec of the run's kind; read anew, since a list of
        runs does not hold thousands. Raises Refusal."""
        return _spec(self.dir.spec, stamp([self.dir.spec]))

    @cached_property
    def facts(self) -> RunFacts:
        """What lists show of it, as its files said at the first question."""
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
        """What may be asked of the run in this state."""
        if self.state in ALIVE_STATES:
            return {"stop", "kill", "clone"}
        if self.state == "queued":
            return {"kill", "clone", "delete"}
        # A finished export may lack its GGUF file: then that step is what is left to do.
        left = self.state != "finished" or (self.kind == "export" and gguf.can_be_tried_again(self.dir))
        return {"clone", "delete"} | ({"resume"} if left else set())


@lru_cache(maxsize=1024)
def _spec(path: Path, _stamp: str) -> Spec:
    try:
        return kinds.read(regular_files.read_text(path))
    except (OSError, UnicodeDecodeError):
        raise Refusal(problem("run-file-damaged", file=path.name, run=path.parent.name)) from None


def _request_of(run: RunDir) -> dict[str, Any]:
    """request.json; of a damaged one what can be known without it, and {} if there is none."""
    request = read_object(run.request)
    kind = request.get("kind", "training")
    if isinstance(request.get("submitted"), (int, float)) and isinstance(kind, str) and kind in kinds.KINDS:
        return {"by": "", "attempt": 1, **request}
    return DAMAGED_REQUEST | {"submitted": _changed(run.path)} if os.path.lexists(run.request) else {}


def _exit_of(run: RunDir) -> dict[str, Any] | None:
    """exit.json, None while there is none; of a run with a damaged one, or a damaged request that never ran: failed."""
    exit = read_object(run.exit)
    if exit.get("outcome") in FINAL_STATES and isinstance(exit.get("ended"), (int, float)):
        return {"reason": exit["outcome"], "code": None, "signal": None, **exit}
    damaged = os.path.lexists(run.exit) or (not run.alive() and _request_of(run).get("damaged"))
    return DAMAGED_EXIT if damaged else None  # nobody knows when it ended


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def state(run: RunDir) -> str:
    """What the folder says: see docs/architecture.md."""
    # In this order: a supervisor takes the lock, writes keeper.json, then exit.json, and lets go of the lock. Whoever
    # looks at keeper.json only at the end may see that of a supervisor that came after the look at the lock.
    supervised = os.path.lexists(run.keeper)
    alive = run.alive()
    if exit := _exit_of(run):
        return exit["outcome"]
    if alive:
        if read_object(run.request).get("stop"):
            return "stopping"
        phase = read_object(run.progress).get("phase")
        return (
            "running"
            if phase in ("training", "evaluating", "tasks", "exporting", "saving", "converting", WAITING_FOR_SPACE)
            else "preparing"
        )
    # Both times: resume takes keeper.json away before exit.json.
    return "interrupted" if supervised and os.path.lexists(run.keeper) else "queued"


def read(folder: Path, saves: Path) -> Run:
    """The run in `folder` as it is now."""
    run = RunDir(folder)
    now = state(run)
    return Run(
        id=folder.relative_to(saves).as_posix(), path=folder, state=now, request=_request_of(run), exit=_exit_of(run)
    )


def has_ended(run: Run) -> bool:
    """Whether nothing but resume or deletion can change it: its exit.json is whole, and none of its processes lives."""
    damaged = run.exit in (None, DAMAGED_EXIT) or run.request.get("damaged")
    return not damaged and not run.dir.alive()
