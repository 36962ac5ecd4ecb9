"""What can be deleted from the saves folder without losing a result: listed first, deleted on request.

Of finished runs: checkpoints and prepared rows, which can be prepared again. Of no run: rows prepared for runs that no
longer exist, and leftovers of deletions. Runs that can be resumed keep everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.core.locks import is_locked
from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE
from engine.launch.engine_choice import is_local
from engine.runs import queue, runs
from engine.runs.run import Run, read

PREPARED_FOLDER, DELETED_FOLDER = ".prepared", ".deleted"
KINDS = ("checkpoints", "rows", "cache", "deleted")
DAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Removable:
    """A file or folder that can be deleted: its kind, and the title of its run ("" if it has none). `bytes` are those
    of its files; rows shared by a run and the cache are counted with the run, or with the cache if no run has them."""

    kind: str
    path: Path
    run: str
    bytes: int
    changed: float  # seconds since the epoch


def removable(
    saves: Path, kinds: Collection[str] = KINDS, older_than_days: float = 0, at_least_bytes: int = 0
) -> list[Removable]:
    """What can be deleted, largest first: of these kinds, unchanged for so many days, and at least so many bytes."""
    before = time.time() - older_than_days * DAY_SECONDS
    every = [item for kind in kinds for item in _LISTED[kind](saves)]
    needed = _needed_folders(saves) if any(item.kind == "checkpoints" for item in every) else set()
    fitting = [
        item
        for item in every
        if item.changed <= before and item.bytes >= at_least_bytes and not _stands_on(item.path, needed)
    ]
    return sorted(fitting, key=lambda item: item.bytes, reverse=True)


def remove(saves: Path, items: Iterable[Removable]) -> list[Removable]:
    """Delete them, except those of a run that is no longer finished, and those that another run now depends on. Returns
    what was deleted; if this is interrupted by a kill, the rest is listed as leftovers next time."""
    gone = []
    needed = _needed_folders(saves)
    for item in items:
        with contextlib.suppress(OSError):
            if (away := _take_away(saves, item, needed)) is not None:
                gone.append(item)
                shutil.rmtree(away, ignore_errors=True) if away.is_dir() else away.unlink()
    return gone


def _take_away(saves: Path, item: Removable, needed: Collection[str]) -> Path | None:
    """Its new path, moved atomically, so that nobody finds half of it. Under the lock of the queue, so that nobody
    resumes the run in between, but only for the move: deleting many gigabytes takes minutes."""
    if item.path.is_symlink() or _stands_on(item.path, needed):
        return None
    folder = saves / DELETED_FOLDER
    folder.mkdir(exist_ok=True)
    away = folder / f"{item.path.name}-{time.time_ns()}"
    with queue.locked(saves):
        if item.run and read(saves / item.run, saves).state != "finished":
            return None
        item.path.rename(away)
    return away


def _needed_folders(saves: Path) -> set[str]:
    """The real folders of the bases and adapters that runs start from."""
    needed = set()
    for run in runs.find(saves):
        with contextlib.suppress(Refusal):
            model = run.spec.model
            needed |= {os.path.realpath(path) for path in (model.model_name_or_path, model.adapter_path) if path}
    return needed


def _stands_on(path: Path, needed: Collection[str]) -> bool:
    real = os.path.realpath(path)
    return any(folder == real or folder.startswith(real + os.sep) for folder in needed)


def _checkpoints(saves: Path) -> Iterator[Removable]:
    for run in _finished(saves):
        for folder in run.path.glob("checkpoint-*"):
            if not folder.is_symlink():
                yield _item("checkpoints", folder, run.id)


def _rows(saves: Path) -> Iterator[Removable]:
    """The summary is kept: it names the hub model that an adapter belongs to."""
    for run in _finished(saves):
        for file in run.dir.prepared.glob("*.arrow"):
            yield _item("rows", file, run.id)


def _cache(saves: Path) -> Iterator[Removable]:
    for folder in (saves / PREPARED_FOLDER).glob("*/"):
        if not _may_be_in_use(folder, saves):
            yield _item("cache", folder, links=1)


def _may_be_in_use(folder: Path, saves: Path) -> bool:
    """Whether somebody may be preparing rows there. If runs are on other machines, no lock says so: what they have
    abandoned is removed by a later run that prepares rows."""
    lock = folder / "lock"
    try:
        return lock.exists() and (not is_local(saves) or is_locked(lock, ALIVE_BYTE))
    except OSError:  # no permission, or a file system without locks
        return True


def _deleted(saves: Path) -> Iterator[Removable]:
    for folder in (saves / DELETED_FOLDER).glob("*"):
        yield _item("deleted", folder)


_LISTED = {"checkpoints": _checkpoints, "rows": _rows, "cache": _cache, "deleted": _deleted}


def _finished(saves: Path) -> list[Run]:
    """Runs with a result."""
    return [run for run in runs.find(saves) if run.state == "finished" and run.facts.result_stage]


def _item(kind: str, path: Path, run: str = "", links: int = 2) -> Removable:
    """`links`: the number of hard links, including this one, with which a file is still counted here."""
    size, changed = 0, 0.0
    for file in _files(path):
        with contextlib.suppress(OSError):
            status = file.lstat()
            size += status.st_size if status.st_nlink <= links else 0
            changed = max(changed, status.st_mtime)
    return Removable(kind, path, run, size, changed)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)
