"""What can be removed from the saves folder without losing a result: listed first, removed when somebody says so.

Of finished runs: checkpoints, and prepared rows, which are made again if they are ever needed. Of nobody: rows
that were prepared for runs since gone, and what deletions left behind. Runs that can be resumed keep everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE, is_locked
from engine.runs import queue, runs
from engine.runs.run import Run, read

PREPARED_FOLDER, DELETED_FOLDER = ".prepared", ".deleted"
KINDS = ("checkpoints", "rows", "cache", "deleted")
DAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Removable:
    """A file or folder that can go: of which kind, and what its run is called (""
    if it is of none). `bytes` are those of its files; rows that a run and the cache
    share are counted with the run, and with the cache where no run has them."""

    kind: str
    path: Path
    run: str
    bytes: int
    changed: float  # seconds since the epoch


def removable(
    saves: Path, kinds: Collection[str] = KINDS, older_than_days: float = 0, at_least_bytes: int = 0
) -> list[Removable]:
    """What can go, the largest first: of these kinds, unchanged for so many days, of at least so many bytes."""
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
    """Remove them, but nothing of a run that is not finished any more, and nothing that another run stands on
    since. Returns what is gone; what a kill interrupts is listed as remains of deletions the next time."""
    gone = []
    needed = _needed_folders(saves)
    for item in items:
        with contextlib.suppress(OSError):
            if (away := _take_away(saves, item, needed)) is not None:
                gone.append(item)
                shutil.rmtree(away, ignore_errors=True) if away.is_dir() else away.unlink()
    return gone


def _take_away(saves: Path, item: Removable, needed: Collection[str]) -> Path | None:
    """Where it lies now, in one step: nobody finds half of it. Under the lock of the queue, so that
    nobody resumes the run in between, and no longer than that: many gigabytes take minutes."""
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
    """The real folders of the bases and adapters that runs begin from."""
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
    """The summary stays: it names the model of a hub that an adapter is of."""
    for run in _finished(saves):
        for file in run.dir.prepared.glob("*.arrow"):
            yield _item("rows", file, run.id)


def _cache(saves: Path) -> Iterator[Removable]:
    for folder in (saves / PREPARED_FOLDER).glob("*/"):
        if not is_locked(folder / "lock", ALIVE_BYTE):
            yield _item("cache", folder, links=1)


def _deleted(saves: Path) -> Iterator[Removable]:
    for folder in (saves / DELETED_FOLDER).glob("*"):
        yield _item("deleted", folder)


_LISTED = {"checkpoints": _checkpoints, "rows": _rows, "cache": _cache, "deleted": _deleted}


def _finished(saves: Path) -> list[Run]:
    """Runs whose result is there."""
    return [run for run in runs.find(saves) if run.state == "finished" and run.facts.result_stage]


def _item(kind: str, path: Path, run: str = "", links: int = 2) -> Removable:
    """`links`: hard links that a file may have, this one among them, and be counted here."""
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
