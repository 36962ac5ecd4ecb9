"""A file from outside → a data file in the data folder: under a safe name, beside what is there and never over it.

A workbook is turned into JSON lines on the way. What the rows of a file mean is said in `engine.catalogue`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine import machine, sheets
from engine.datasets import INFO_FILE, Dataset
from engine.problems import Refusal, problem
from engine.rowfiles import SUFFIXES

ACCEPTED = (*SUFFIXES, ".xlsx")
LARGEST = 8 << 30  # bytes of one upload
LARGEST_SHEET = 512 << 20  # bytes of a workbook, packed
LISTED = 1000  # files of a data folder that are offered


def receive(source: Path, given: str, data_dir: Path) -> Path:
    """Take the file `source`, which its owner calls `given`, into the data folder; `source` stays where it is.

    Returns where it is now. A workbook may take a minute. Raises Refusal if it is of no use, or cannot be kept.
    """
    name = safe_name(given)
    suffix = Path(name).suffix.lower()
    if suffix not in ACCEPTED:
        raise Refusal(problem("upload-format", file=name, known=", ".join(ACCEPTED)))
    size, limit = source.stat().st_size, LARGEST_SHEET if suffix == ".xlsx" else LARGEST
    if size > limit:
        raise Refusal(problem("upload-too-large", file=name, size=_mb(size), limit=_mb(limit)))
    if not size:
        raise Refusal(problem("upload-empty", file=name))
    if size > machine.free_disk(data_dir):
        raise Refusal(problem("data-not-writable", folder=data_dir, why=os.strerror(errno.ENOSPC)))
    target = name if suffix != ".xlsx" else f"{Path(name).stem}.jsonl"
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".arriving-") as folder:
            arrived = Path(folder) / target
            if suffix == ".xlsx":
                sheets.to_jsonl(source, arrived)
            else:
                shutil.copyfile(source, arrived)
            return place(arrived, data_dir)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error


def place(file: Path, data_dir: Path) -> Path:
    """Move a finished file of the same disk into the data folder, under its own name or the next that is free."""
    for name in _names(file.name):
        target = data_dir / name
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            continue
        os.replace(file, target)
        os.chmod(target, 0o644)
        return target
    raise AssertionError("names do not end")


def _names(name: str) -> Iterator[str]:
    yield name
    stem, suffix = os.path.splitext(name)
    number = 1
    while True:
        number += 1
        yield f"{stem}-{number}{suffix}"


def safe_name(given: str) -> str:
    """A file name without folders, without leading dots, of letters and digits of any script and a few signs."""
    name = unicodedata.normalize("NFC", given).replace("\\", "/").rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.() -]+", "_", name).strip(" .")
    stem, suffix = os.path.splitext(name)
    while len(stem.encode()) > 150:  # file systems end at 255 bytes, and copies get a number
        stem = stem[:-1]
    return (stem.strip(" .") or "data") + suffix.lower()


def unregistered(data_dir: Path, catalogue: Sequence[Dataset]) -> list[str]:
    """Data files in the data folder that no data set names, by their path below it, newest first."""
    known = {file.resolve() for dataset in catalogue for file in dataset.files}
    found: list[tuple[float, str]] = []
    for folder, folders, files in os.walk(data_dir):
        depth = len(Path(folder).relative_to(data_dir).parts)
        folders[:] = [
            one for one in folders if not one.startswith(".") and depth < 2 and not _is_model(folder, one)
        ]
        for name in files:
            file = Path(folder, name)
            if not _writable_name(file):
                continue  # no page could name it
            if name.startswith(".") or file.suffix.lower() not in SUFFIXES or name == INFO_FILE:
                continue
            if (
                file.is_file()
                and file.resolve() not in known
                and file.resolve().is_relative_to(data_dir.resolve())
            ):
                found.append((-file.stat().st_mtime, str(file.relative_to(data_dir))))
    return [name for _, name in sorted(found)[:LISTED]]


def _writable_name(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_model(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name, "config.json"))


def _mb(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MB"
