"""How much of the GPUs and the disk somebody uses, beside their quotas.

Counted from the folders of their runs and drafts each time: nothing is kept that could differ from them, except the
hours of runs that have been deleted (`engine.runs.spent_hours`).
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import stamp
from engine.data.dataset_info import read_dataset_info
from engine.data.draft_folders import draft_folders, read_request
from engine.data.owners import owned_by, set_id
from engine.runs import attempts, index, spent_hours
from engine.runs.quotas import read_quotas
from engine.runs.run import ALIVE_STATES, Run

WINDOW_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Use:
    """What one user uses now."""

    runs: int  # that are alive
    gpu_hours: float  # in the last 30 days
    disk_gb: float


def use_of(saves: Path, data: Path, user: str, now: float | None = None) -> Use:
    """The use of a user; `now` in seconds since 1970."""
    runs = runs_of(saves, user)
    now = time.time() if now is None else now
    alive = sum(run.state in ALIVE_STATES for run in runs)
    return Use(alive, hours_of(saves, user, now), disk_bytes(saves, data, user) / 1e9)


def runs_of(saves: Path, user: str) -> list[Run]:
    """The runs that belong to a user."""
    return [run for run in index.runs(saves) if run.by == user]


def gpu_hours(runs: list[Run], now: float) -> float:
    """The GPU hours of runs within the 30 days before `now`; on the CPU, a process counts as a GPU."""
    since = now - WINDOW_SECONDS
    recent = (run for run in runs if not (run.final and run.ended and run.ended < since))  # others need no look
    return sum(attempts.gpu_hours(run, now, since) for run in recent)


def hours_of(saves: Path, user: str, now: float | None = None) -> float:
    """The GPU hours of a user in the 30 days before `now`, in seconds since 1970; those of deleted runs, too."""
    now = time.time() if now is None else now
    present = runs_of(saves, user)
    deleted = spent_hours.hours(saves, user, now, now - WINDOW_SECONDS, {run.id for run in present})
    return gpu_hours(present, now) + deleted


def hours_left(saves: Path, user: str) -> tuple[float, float] | None:
    """How many GPU hours a user may still use, and of how many; None without a limit. Raises Refusal if the quotas
    cannot be read."""
    limit = read_quotas(saves).of(user).gpu_hours
    return None if limit is None else (max(limit - hours_of(saves, user), 0.0), limit)


def data_bytes(data: Path, user: str) -> int:
    """The size of a user's data sets and files."""
    ids = set(owned_by(data, user))
    if not ids:
        return 0
    own = [dataset for dataset in read_dataset_info(data)[0] if set_id(dataset.name) in ids]
    files = {file for dataset in own for file in dataset.files}
    files |= {data / id.removeprefix("file:") for id in ids if id.startswith("file:")}
    return sum(map(_size, {file.resolve() for file in files}))


def disk_bytes(saves: Path, data: Path | None, user: str) -> int:
    """The size of a user's runs, drafts, and data sets; without `data`, the latter do not count."""
    drafts = (_walked_bytes(folder) for folder in draft_folders(saves) if read_request(folder).get("by", "") == user)
    return sum(map(_run_bytes, runs_of(saves, user))) + sum(drafts) + (data_bytes(data, user) if data else 0)


def _run_bytes(run: Run) -> int:
    """The size of a run's folder, remembered for one that has ended until its folder changes."""
    files = (run.dir.exit, run.path)
    return _folder_bytes(run.path, stamp(files) if run.final else f"{time.time()}")


@lru_cache(maxsize=4096)
def _folder_bytes(folder: Path, _stamp: str) -> int:
    return _walked_bytes(folder)


def _walked_bytes(folder: Path) -> int:
    return sum(_size(Path(inner, name)) for inner, _, names in os.walk(folder) for name in names)


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):
        status = file.lstat()
        return status.st_size // max(status.st_nlink, 1) if not file.is_symlink() else 0
    return 0


def excess(saves: Path, data: Path | None, user: str) -> list[Problem]:
    """Why a user may not start another run: each limit that has been reached, with what is used. Without `data`, data
    sets do not count towards the disk. For what runs already, see `engine.runs.quota_watch`. The limit of runs at once
    is no reason: then the run waits."""
    try:
        limits = read_quotas(saves).of(user)
    except Refusal as refusal:
        return refusal.problems
    problems = []
    if limits.gpu_hours is not None:
        used = hours_of(saves, user)
        if used >= limits.gpu_hours:
            problems.append(problem("quota-hours", user=user, used=f"{used:,.1f}", limit=f"{limits.gpu_hours:g}"))
    return problems + disk_excess(saves, data, user)


def disk_excess(saves: Path, data: Path | None, user: str) -> list[Problem]:
    """Why a user may not put anything more on the disk; empty if they may. `data`: as in `excess`."""
    try:
        limit = read_quotas(saves).of(user).disk_gb
    except Refusal as refusal:
        return refusal.problems
    if limit is None or (used := disk_bytes(saves, data, user) / 1e9) < limit:
        return []
    return [problem("quota-disk", user=user, used=f"{used:.3g}", limit=f"{limit:g}")]
