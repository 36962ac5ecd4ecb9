"""What can be removed from the saves folder without losing a result: listed first, removed when somebody says so.

Of finished runs: checkpoints, and prepared rows, which are made again if they are ever needed. Of nobody: rows that were prepared
for runs since gone, and what deletions left behind. Runs that can be resumed keep everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.core.rundir import ALIVE_BYTE, is_locked
from engine.runs import queue, runs
from engine.runs.run import Run, read

PREPARED_FOLDER, DELETED_FOLDER = ".prepared", ".deleted"
KINDS = ("checkpoints", "rows", "cache", "deleted")
DAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Removable:
    """A file or folder that can go: of which kind, and what its run is called ("" if it is of none). `bytes` are those that the
    disk gets back: a file with another hard link gives none."""

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
    every = (item for kind in kinds for item in _LISTED[kind](saves))
    fitting = [item for item in every if item.changed <= before and item.bytes >= at_least_bytes]
    return sorted(fitting, key=lambda item: item.bytes, reverse=True)


def remove(saves: Path, items: Iterable[Removable]) -> list[Removable]:
    """Remove them, but nothing of a run that is not finished any more. Returns what is gone."""
    gone = []
    for item in items:
        # Under the lock of the queue, so that nobody resumes the run meanwhile.
        with contextlib.suppress(OSError), queue.locked(saves):
            if item.run and read(saves / item.run, saves).state != "finished":
                continue
            if item.path.is_dir():
                away = item.path.with_name(f".gone-{item.path.name}")
                item.path.rename(away)  # in one step: nobody finds half of it
                shutil.rmtree(away)
            else:
                item.path.unlink()
            gone.append(item)
    return gone


def _checkpoints(saves: Path) -> Iterator[Removable]:
    for run in _finished(saves):
        for folder in run.path.glob("checkpoint-*"):
            yield _item("checkpoints", folder, run.id)


def _rows(saves: Path) -> Iterator[Removable]:
    """The summary stays: it names the model of a hub that an adapter is of."""
    for run in _finished(saves):
        for file in run.dir.prepared.glob("*.arrow"):
            yield _item("rows", file, run.id)


def _cache(saves: Path) -> Iterator[Removable]:
    for folder in (saves / PREPARED_FOLDER).glob("*/"):
        if not is_locked(folder / "lock", ALIVE_BYTE):
            yield _item("cache", folder)


def _deleted(saves: Path) -> Iterator[Removable]:
    for folder in (saves / DELETED_FOLDER).glob("*"):
        yield _item("deleted", folder)


_LISTED = {"checkpoints": _checkpoints, "rows": _rows, "cache": _cache, "deleted": _deleted}


def _finished(saves: Path) -> list[Run]:
    """Runs whose result is there."""
    return [run for run in runs.find(saves) if run.state == "finished" and run.facts.result_stage]


def _item(kind: str, path: Path, run: str = "") -> Removable:
    size, changed = 0, 0.0
    for file in _files(path):
        with contextlib.suppress(OSError):
            status = file.lstat()
            size += status.st_size if status.st_nlink == 1 else 0
            changed = max(changed, status.st_mtime)
    return Removable(kind, path, run, size, changed)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)
