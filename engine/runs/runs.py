"""Submit, list, stop, resume and delete runs. The current state of a run is read from its folder each time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import RunDir, read_json, step_of, write_json, write_text
from engine.launch.workspace import Workplace
from engine.preflight import checks
from engine.runs import attempts, engines, index, kinds, queue, quota_use, resumption, spent_hours, standby
from engine.runs.outcome import determine_outcome
from engine.runs.run import Run, read, state
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.yaml_text import MAX_YAML_CHARACTERS

MAX_NAMED = 10  # runs that a message lists


def find(saves: Path, *kinds: str) -> list[Run]:
    """All runs, or those of some kinds, newest first."""
    selected = (run for run in index.runs(saves) if not kinds or run.kind in kinds)
    return sorted(selected, key=lambda run: run.submitted, reverse=True)


def get(saves: Path, id: str, fits: Callable[[Run], bool] = lambda _: True, *, abbreviated: bool = False) -> Run:
    """The run with that id, or the only run with that folder name or name or, if it may be `abbreviated`, whose id,
    folder name or name begins or ends like that. Of several with that name, only those that `fits` accepts are
    considered, but an abbreviation must leave no choice. Raises Refusal if there is none in `saves`, none of several
    fits, or still several do."""
    if run := _with_id(saves, id):
        return run
    named = _named(find(saves), id, fits) if id and "/" not in id else []
    if not named and id and abbreviated and id.count("/") < 2:  # a whole ID of a run that is gone means no other run
        named = [run for run in find(saves) if _abbreviates(id, run)]
    if len(named) > 1:
        if not any(map(fits, named)):
            states = _listed([f"{run.id} ({run.state})" for run in named])
            raise Refusal(problem("run-none-fits", name=id, runs=states))
        raise Refusal(problem("run-several", name=id, ids=_listed([run.id for run in named])))
    if run := _with_id(saves, named[0].id if named else ""):
        return run
    raise Refusal(problem("run-unknown", id=id))


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:MAX_NAMED] + ["…"] * (len(texts) > MAX_NAMED))


def _with_id(saves: Path, id: str) -> Run | None:
    if re.fullmatch(r"[^/\0]+/[^/\0]+/[^/\0]+", id or "") and not {"..", "."} & set(id.split("/")):
        folder = saves / id
        if (folder / "request.json").exists() and folder.resolve().is_relative_to(saves.resolve()):
            return read(folder, saves)
    return None


def _named(among: list[Run], name: str, fits: Callable[[Run], bool]) -> list[Run]:
    """Those with this folder name, otherwise those with this name; runs that do not fit only if none does."""
    by_folder = [run for run in among if run.path.name == name]
    by_name = [run for run in among if run.facts.name == name]
    fitting = ([run for run in runs if fits(run)] for runs in (by_folder, by_name))
    return next((runs for runs in (*fitting, by_folder, by_name) if runs), [])


def _abbreviates(text: str, run: Run) -> bool:
    """Whether the run's id, folder name or name begins with the text, or ends with it as a whole word."""
    names = (run.id, run.path.name, run.facts.name)
    return any(name.startswith(text) or re.search(rf"(?<!\w){re.escape(text)}$", name) for name in names)


def submit(
    spec: Spec,
    workplace: Workplace,
    by: str = "",
    request: Mapping[str, Any] | None = None,
    start: bool = True,
    fails_later: Callable[[Problem], bool] = lambda _: False,
) -> Run:
    """Freeze the spec into a new folder and put it in the queue. `request`: what else request.json says of it; `start`:
    let the queue move on at once; `fails_later`: problems with which the run itself may fail. Raises Refusal with every
    other problem."""
    kind = kinds.KINDS[spec.kind]
    spec = kind.frozen(spec, workplace)
    text = spec.to_yaml()
    if len(text) > MAX_YAML_CHARACTERS:  # it could not be read back
        raise Refusal(problem("yaml-too-large", size=f"{len(text):,}", limit=f"{MAX_YAML_CHARACTERS:,}"))
    obstacles = [obstacle for obstacle in kind.problems(spec, workplace) if not fails_later(obstacle)]
    if obstacles := [*obstacles, *quota_use.excess(workplace.saves, workplace.data, by)]:
        raise Refusal(obstacles)
    with refusing_write_errors(workplace.saves):
        folder = new_folder(spec, workplace.saves)
        try:
            write_text(RunDir(folder).spec, text)
            # Last: a folder without a request is not a run yet.
            write_json(
                RunDir(folder).request,
                {
                    "kind": spec.kind,
                    "by": by,
                    "submitted": time.time(),
                    "queued": time.time_ns(),
                    "attempt": 1,
                    "stop": None,
                    "devices": queue.demand_fields(spec, kind.memory(spec), kind.capability(spec)),
                    **(request or {}),
                },
            )
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if start:
            engines.advance(workplace.saves, standby.hand_over)
    return read(folder, workplace.saves)


@contextlib.contextmanager
def refusing_write_errors(saves: Path) -> Iterator[None]:
    """Convert an error while writing to a problem. Raises Refusal."""
    try:
        yield
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error


def new_folder(spec: Spec, saves: Path, at: float | None = None) -> Path:
    """Create the folder of a run, called after its model, its name, and when it was submitted (`at` in seconds since
    1970; None: now). Raises Refusal."""
    model = _slug(_model_name(Path(spec.model.model_name_or_path), saves)) or "model"
    stem = "-".join(filter(None, (time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(at)), _slug(spec.name))))
    for number in range(1, 1000):
        folder = saves / model / spec.shelf / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=False)
            return folder
        except FileExistsError:
            continue
    raise Refusal(problem("too-many-runs", folder=folder.parent))


def _model_name(model: Path, saves: Path) -> str:
    """The name of a model's folder; for the result of a run in `saves`, that of the model which the run began with."""
    return model.relative_to(saves).parts[0] if saves in model.parents else model.name


def _slug(text: str) -> str:
    """A file name of letters and digits of any script, so that quotes, spaces and dots in a name do no harm."""
    return re.sub(r"[^\w.]+", "-", text).strip("-._")[:60]


def stop(run: Run, how: str = "save", by: str = "") -> None:
    """Request the end of a run: "save" writes a checkpoint first, "kill" ends its processes. Raises Refusal."""
    action = "stop" if how == "save" else "kill"
    if action not in run.can:
        code = "run-cannot-stop" if how == "save" else "run-cannot-kill"
        raise Refusal(problem(code, state=run.state))
    saves = queue.saves_of(run.path)
    with refusing_write_errors(saves), queue.locked(saves):
        request = read_json(run.dir.request)
        write_json(run.dir.request, request | {"stop": {"how": how, "by": by, "at": time.time()}})
        if waited := state(run.dir) == "queued":
            write_json(run.dir.exit, determine_outcome(run.dir, -15))
    engines.engine_of(run.dir).end(run, how, waited)


def resume(run: Run, by: str = "", spec: RunSpec | None = None, data: Path | None = None) -> None:
    """Queue the run again. It continues from its newest complete checkpoint; a finished export only repeats its GGUF
    step. `spec`: that with which it continues, as `resumption.moved` returns it; None: its own. `data`: the data
    folder, which counts towards the quota of the disk. Raises Refusal."""
    saves = queue.saves_of(run.path)
    with refusing_write_errors(saves), queue.locked(saves):
        run = read(run.path, saves)
        if origin := run.request.get("imported"):
            raise Refusal(problem("import-run-no-resume", tool=origin["tool"]))
        if "resume" not in run.can:
            raise Refusal(problem("run-cannot-resume", state=run.state))
        if reached := quota_use.excess(saves, data, run.by):
            raise Refusal(reached)
        continued = spec or run.spec
        if obstacles := checks.engine_problems(continued.hardware, saves) or checks.driver_problems(continued.hardware):
            raise Refusal(obstacles)
        if left := engines.engine_of(run.dir).left(run.dir):
            raise Refusal(left)
        number, checkpoints = attempts.ended_number(run.dir), run.dir.checkpoints()
        (run.dir.attempts / str(number)).mkdir(parents=True, exist_ok=True)
        request = run.request | {
            "attempt": number + 1,
            "queued": time.time_ns(),
            "stop": None,
            "held": False,
            "now": False,
            "resumed_by": by,
            "resumed_from": step_of(checkpoints[-1]) if checkpoints else 0,
            **resumption.request_fields(run, continued),
        }
        write_json(run.dir.request, resumption.with_precision(run, request))
        changed = resumption.change_spec(run.dir, run.spec, continued) if isinstance(continued, RunSpec) else None
        for notice in filter(None, [*resumption.notices(run, request), changed]):
            write_warning(run.dir, notice, request["resumed_from"])
        # exit.json is removed last: until then the state of the run does not change.
        attempts.put_aside(run.dir, number, run.dir.slurm, run.dir.exit)
    engines.advance(saves)


def delete(run: Run) -> None:
    """Delete the run's folder and everything in it. Raises Refusal while it is alive."""
    saves = queue.saves_of(run.path)
    with refusing_write_errors(saves), queue.locked(saves):
        run = read(run.path, saves)
        if "delete" not in run.can:
            raise Refusal(problem("run-cannot-delete", state=run.state))
        if run.state == "queued":
            engines.engine_of(run.dir).withdraw(run.dir)
        now = time.time()
        spent_hours.note(saves, run, now, now - quota_use.WINDOW_SECONDS)
        gone = saves / ".deleted" / f"{run.path.name}-{time.time_ns()}"
        gone.parent.mkdir(exist_ok=True)
        run.path.rename(gone)  # atomic: nobody sees half a run
    shutil.rmtree(gone, ignore_errors=True)


def files(run: Run) -> list[tuple[str, int]]:
    """Files of the run as (path relative to its folder, bytes), without hidden ones."""
    listing = []
    for folder, _, names in os.walk(run.path):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # pruned in the meantime
                if not name.startswith(".") and not path.is_symlink():
                    listing.append((path.relative_to(run.path).as_posix(), path.stat().st_size))
    return sorted(listing)


def file(run: Run, name: str) -> Path:
    """A file of the run by its relative name. Raises Refusal if it is not one."""
    if name not in dict(files(run)):
        raise Refusal(problem("file-unknown", name=name))
    return run.path / name
