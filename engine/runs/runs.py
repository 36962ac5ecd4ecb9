"""Runs: submit, list, stop, resume, delete. What a run is right now is read from its folder each time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import (
    SUPERVISED_BYTE,
    RunDir,
    is_locked,
    read_json,
    read_object,
    run_folders,
    stamp,
    write_json,
    write_text,
)
from engine.export import gguf
from engine.launch import command
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import kinds, queue
from engine.runs.outcome import determine_outcome
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

    @property
    def dir(self) -> RunDir:
        return RunDir(self.path)

    @property
    def kind(self) -> str:
        """A key of `engine.runs.kinds.KINDS`."""
        return self.request.get("kind", "training")

    @cached_property
    def spec(self) -> Any:
        """A RunSpec, or the spec of the run's kind."""
        return _spec(self.dir.spec, stamp([self.dir.spec]))

    @property
    def title(self) -> str:
        return _name(self) or self.path.name

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
    def queue_position(self) -> int | None:
        """1 for the run that is alive, 2 for the first that waits behind it; None if it does not wait."""
        if self.state != "queued":
            return None
        order = queue.waiting(queue.saves_of(self.path))
        return order.index(self.path) + 2 if self.path in order else None  # it may have started meanwhile

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
        return kinds.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise Refusal(problem("run-file-damaged", file=path.name, run=path.parent.name)) from None


def _request_of(run: RunDir) -> dict[str, Any]:
    """request.json; of a damaged one what can be known without it, and {} if there is none."""
    request = read_object(run.request)
    if isinstance(request.get("submitted"), (int, float)) and request.get("kind", "training") in kinds.KINDS:
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
    alive = run.alive()
    # Read after the lock: the supervisor writes exit.json first and lets go of the lock then.
    if exit := _exit_of(run):
        return exit["outcome"]
    if alive:
        if read_object(run.request).get("stop"):
            return "stopping"
        phase = read_object(run.progress).get("phase")
        return (
            "running"
            if phase in ("training", "evaluating", "tasks", "exporting", "saving", "converting")
            else "preparing"
        )
    return "interrupted" if run.keeper.exists() else "queued"


def read(folder: Path, saves: Path) -> Run:
    """The run in `folder` as it is now."""
    run = RunDir(folder)
    now = state(run)
    return Run(
        id=folder.relative_to(saves).as_posix(), path=folder, state=now,
        request=_request_of(run), exit=_exit_of(run),
    )  # fmt: skip


def find(saves: Path, *kinds: str) -> list[Run]:
    """All runs, or those of some kinds, newest first."""
    all_runs = [read(folder, saves) for folder in run_folders(saves)]
    selected = (run for run in all_runs if run.request and (not kinds or run.kind in kinds))
    return sorted(selected, key=lambda run: run.submitted, reverse=True)


def _name(run: Run) -> str:
    """The name that its spec gives it; "" if it gives none, or cannot be read."""
    try:
        return run.spec.name
    except (Refusal, OSError, UnicodeDecodeError):
        return ""


def get(saves: Path, id: str, fits: Callable[[Run], bool] = lambda _: True) -> Run:
    """The run with that id, or the only run with that folder name or that name. Where several have it, only those that
    `fits` are considered. Raises Refusal if there is none below `saves`, or still several."""
    if id and "/" not in id:
        called = _named(find(saves), id, fits)
        if len(called) > 1:
            ids = ", ".join(run.id for run in called)
            raise Refusal(problem("run-several", name=id, ids=ids))
        id = called[0].id if called else id
    if re.fullmatch(r"[^/\0]+/[^/\0]+/[^/\0]+", id or "") and not {"..", "."} & set(id.split("/")):
        folder = saves / id
        if (folder / "request.json").exists() and folder.resolve().is_relative_to(saves.resolve()):
            return read(folder, saves)
    raise Refusal(problem("run-unknown", id=id))


def _named(among: list[Run], name: str, fits: Callable[[Run], bool]) -> list[Run]:
    """Those whose folder is called so, else those whose name it is; runs that do not fit only where none does."""
    by_folder = [run for run in among if run.path.name == name]
    by_name = [run for run in among if _name(run) == name]
    fitting = ([run for run in runs if fits(run)] for runs in (by_folder, by_name))
    return next((runs for runs in (*fitting, by_folder, by_name) if runs), [])


def submit(spec: Spec, workplace: Workplace, by: str = "") -> Run:
    """Freeze the spec into a new folder and put it in the queue. Raises Refusal with every problem."""
    kind = kinds.KINDS[spec.kind]
    spec = kind.frozen(spec, workplace)
    if obstacles := kind.problems(spec, workplace):
        raise Refusal(obstacles)
    with _refusing_write_errors(workplace.saves):
        folder = _new_folder(spec, workplace.saves)
        try:
            write_text(RunDir(folder).spec, spec.to_yaml())
            # Last: a folder without a request is no run yet.
            write_json(
                RunDir(folder).request,
                {
                    "kind": spec.kind,
                    "by": by,
                    "submitted": time.time(),
                    "queued": time.time_ns(),
                    "attempt": 1,
                    "stop": None,
                },
            )
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        queue.advance(workplace.saves)
    return read(folder, workplace.saves)


@contextlib.contextmanager
def _refusing_write_errors(saves: Path) -> Iterator[None]:
    """Turn an error while writing into a sentence. Raises Refusal."""
    try:
        yield
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error


def _new_folder(spec: Spec, saves: Path) -> Path:
    model = _slug(Path(spec.model.model_name_or_path).name) or "model"
    stem = "-".join(filter(None, (time.strftime("%Y-%m-%d-%H-%M-%S"), _slug(spec.name))))
    for number in range(1, 1000):
        folder = saves / model / spec.shelf / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=False)
            return folder
        except FileExistsError:
            continue
    raise Refusal(problem("too-many-runs", folder=folder.parent))


def _slug(text: str) -> str:
    """A file name of letters and digits of any script, so that quotes, spaces and dots of a name do no harm."""
    return re.sub(r"[^\w.]+", "-", text).strip("-._")[:60]


def stop(run: Run, how: str = "save", by: str = "") -> None:
    """Ask the run to end: "save" writes a checkpoint first, "kill" ends its processes. Raises Refusal."""
    action = "stop" if how == "save" else "kill"
    if action not in run.can:
        raise Refusal(problem("run-cannot", what=action, state=run.state))
    saves = queue.saves_of(run.path)
    with _refusing_write_errors(saves), queue.locked(saves):
        request = read_json(run.dir.request)
        write_json(run.dir.request, request | {"stop": {"how": how, "by": by, "at": time.time()}})
        if state(run.dir) == "queued":
            write_json(run.dir.exit, determine_outcome(run.dir, -15))
    if how == "kill" and not is_locked(run.dir.lock, SUPERVISED_BYTE):
        # The supervisor is gone but a process of the run lives: another process has to end it.
        subprocess.Popen(
            [sys.executable, "-m", "engine.runs.supervisor", "end", str(run.path)], cwd=PROJECT, env=command.inherited_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def resume(run: Run, by: str = "") -> None:
    """Queue the run again; it goes on from its newest complete checkpoint, a finished export with its GGUF file alone.
    Raises Refusal."""
    saves = queue.saves_of(run.path)
    with _refusing_write_errors(saves), queue.locked(saves):
        run = read(run.path, saves)
        if "resume" not in run.can:
            raise Refusal(problem("run-cannot", what="resume", state=run.state))
        if left := find_processes(run.path):
            raise Refusal(problem("run-still-there", pids=", ".join(str(process.pid) for process in left)))
        number = run.request["attempt"]
        past = run.dir.attempts / str(number)
        past.mkdir(parents=True, exist_ok=True)
        write_json(
            run.dir.request,
            run.request | {"attempt": number + 1, "queued": time.time_ns(), "stop": None, "resumed_by": by},
        )
        # exit.json goes last: until then the run is what it was.
        for file in (run.dir.error, run.dir.progress, run.dir.keeper, run.dir.exit):
            if file.exists():
                file.rename(past / file.name)
    queue.advance(saves)


def delete(run: Run) -> None:
    """Remove the run's folder and everything in it. Raises Refusal while it is alive."""
    saves = queue.saves_of(run.path)
    with _refusing_write_errors(saves), queue.locked(saves):
        run = read(run.path, saves)
        if "delete" not in run.can:
            raise Refusal(problem("run-cannot", what="delete", state=run.state))
        gone = saves / ".deleted" / f"{run.path.name}-{time.time_ns()}"
        gone.parent.mkdir(exist_ok=True)
        run.path.rename(gone)  # one step: nobody sees half a run
    shutil.rmtree(gone, ignore_errors=True)


def files(run: Run) -> list[tuple[str, int]]:
    """Files of the run as (path relative to its folder, bytes), hidden ones left out."""
    listing = []
    for folder, _, names in os.walk(run.path):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # pruned while we look
                if not name.startswith(".") and not path.is_symlink():
                    listing.append((path.relative_to(run.path).as_posix(), path.stat().st_size))
    return sorted(listing)


def file(run: Run, name: str) -> Path:
    """A file of the run by its relative name. Raises Refusal if it is not one, whatever the name says."""
    if name not in dict(files(run)):
        raise Refusal(problem("file-unknown", name=name))
    return run.path / name
