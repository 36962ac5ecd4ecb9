"""Remove uploads from saves/.tmp after a day, and what interrupted uploads leave in the data folder."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from engine.data.data_jobs import JOBS_FOLDER, DataJob
from engine.data.dataset_info import read_dataset_info
from engine.data.uploads import ARRIVING

UPLOADS_FOLDER = ".tmp"
KEEP_SECONDS = 24 * 3600


def remove_old_uploads(saves: Path, data_dir: Path) -> list[Path]:
    """Remove files that have not changed for a day, except those that a data set names, a job reads or a process has
    open. Returns the removed files."""
    uploads_folder, before = saves / UPLOADS_FOLDER, time.time() - KEEP_SECONDS
    arriving = (folder for folder in data_dir.glob(f"{ARRIVING}*") if not folder.is_symlink())
    folders = [uploads_folder, *arriving]
    old = [file for folder in folders for file in _files(folder) if _changed(file) < before]
    used = set(map(os.path.realpath, _used(saves, data_dir))) if old else set()
    unused = [file for file in old if os.path.realpath(file) not in used]
    for file in unused:
        file.unlink(missing_ok=True)
    for folder in folders:
        for inner, _, _ in os.walk(folder, topdown=False):
            # A folder that is not old may be about to get its file.
            if Path(inner) != uploads_folder and _changed(Path(inner)) < before:
                with contextlib.suppress(OSError):
                    os.rmdir(inner)
    return unused


def _changed(path: Path) -> float:
    """The modification time in seconds since the epoch; infinity if it no longer exists."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return math.inf


def _files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        yield from (Path(inner, name) for name in names)


def _used(saves: Path, data_dir: Path) -> Iterator[Path | str]:
    """Files in use: of data sets, of running jobs, and open files."""
    for dataset in read_dataset_info(data_dir)[0]:
        yield from dataset.files
    for folder in (saves / JOBS_FOLDER).glob("*"):
        job = DataJob(folder)
        if job.state == "working" and (source := job.arguments.get("source")):
            yield source
    for process in psutil.process_iter(["open_files"]):
        yield from (file.path for file in process.info["open_files"] or ())
