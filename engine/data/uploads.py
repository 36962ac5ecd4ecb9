"""A file from outside → a data file in the data folder, under a safe name and without overwriting anything.

Compressed files are unpacked and workbooks converted to JSON lines. A workbook with several tables is kept, hidden,
next to the converted file, so that another sheet can be chosen. What the rows of a file mean is stored by
`engine.data.dataset_info_edits`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from engine.core import hardware
from engine.core.permissions import apply_umask
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import read_object
from engine.data import image_folders, sheet_rows, unpacking, workbooks
from engine.data.datasets import INFO_FILE, Dataset, read_dataset_info
from engine.data.image_folders import is_data_file, is_encodable
from engine.data.images import is_metadata
from engine.data.parquet_probe import prove_bounded
from engine.data.row_files import SUFFIXES, entries
from engine.data.unpacking import PACKED_SUFFIXES
from engine.data.workbooks import WORKBOOK_SUFFIXES

ACCEPTED_SUFFIXES = (*SUFFIXES, *WORKBOOK_SUFFIXES, *PACKED_SUFFIXES)
ARRIVING = ".arriving-"  # prefix of folders in the data folder in which something is being created
MAX_UPLOAD_BYTES = 8 << 30  # bytes of one upload
MAX_WORKBOOK_BYTES = 512 << 20  # bytes of a workbook, as uploaded
ROWS_PROBED = 20  # of a JSON file, of which one has to be JSON
BROKEN_JSON_CODES = ("row-not-json", "file-no-json", "file-broken-json")
MAX_FILES_LISTED = 1000  # number of offered files of a data folder


def receive(
    source: Path, original_name: str, data_dir: Path, on_note: Callable[[Problem], None] = lambda note: None
) -> Path:
    """Take the file `source`, called `original_name` by its owner, into the data folder; `source` stays where it is.

    Returns its new path; `on_note` gets what a person should know about how it was read. A workbook may take a minute.
    Raises Refusal if it is of no use, or cannot be stored.
    """
    name = safe_name(original_name)
    suffix = Path(name).suffix.lower()
    if suffix not in ACCEPTED_SUFFIXES:
        raise Refusal(problem("upload-format", file=name, known=", ".join(ACCEPTED_SUFFIXES)))
    size = source.stat().st_size
    limit = MAX_WORKBOOK_BYTES if suffix in WORKBOOK_SUFFIXES else MAX_UPLOAD_BYTES
    if size > limit:
        raise Refusal(problem("upload-too-large", file=name, size=_megabytes(size), limit=_megabytes(limit)))
    if not size:
        raise Refusal(problem("upload-empty", file=name))
    if size > hardware.free_disk(data_dir):
        raise Refusal(problem("data-not-writable", folder=data_dir, why=os.strerror(errno.ENOSPC)))
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=ARRIVING) as folder:
            if suffix in PACKED_SUFFIXES:
                source = unpacking.unpack(
                    source, name, Path(folder), min(MAX_UPLOAD_BYTES, hardware.free_disk(data_dir))
                )
                if (tree := Path(folder) / unpacking.TREE).is_dir():
                    source = image_folders.write_rows(tree)[0] if source == tree else source
                    return _place_tree(tree, source, name, data_dir)
                if source.suffix.lower() in PACKED_SUFFIXES:
                    raise Refusal(problem("upload-packed-twice", file=name, inner=source.name))
                return receive(source, source.name, data_dir, on_note)
            if suffix in WORKBOOK_SUFFIXES:
                return _receive_workbook(source, name, Path(folder), data_dir, on_note)
            arrived = Path(folder) / name
            shutil.copyfile(source, arrived)
            if suffix == ".parquet":
                prove_bounded(arrived)
            _refuse_broken_json(arrived)
            return place(arrived, data_dir)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error


def _refuse_broken_json(file: Path) -> None:
    """Raises Refusal if none of the first rows of a JSON file is JSON. Another problem, such as its encoding, may be
    solved on the page."""
    rows = [row for _, row in islice(entries(file), ROWS_PROBED)] if file.suffix.lower() in (".json", ".jsonl") else []
    if rows and all(isinstance(row, Problem) and row.code in BROKEN_JSON_CODES for row in rows):
        raise Refusal(rows[0])


def _place_tree(tree: Path, rows: Path, name: str, data_dir: Path) -> Path:
    """Move a folder with a data file and its images into the data folder, called as the zip was; returns the data
    file."""
    if rows.suffix.lower() == ".parquet":
        prove_bounded(rows)
    for folder, _, files in os.walk(tree):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            apply_umask(Path(path))
    inside = rows.relative_to(tree)
    for free in _numbered_names(Path(name).stem):
        try:
            os.mkdir(data_dir / free)
        except FileExistsError:
            continue
        os.rename(tree, data_dir / free)
        return data_dir / free / inside
    raise AssertionError("names do not end")


def _receive_workbook(
    source: Path, name: str, folder: Path, data_dir: Path, on_note: Callable[[Problem], None]
) -> Path:
    arrived = folder / f"{Path(name).stem}.jsonl"
    called = folder / name  # which identifies its format
    called.symlink_to(source.resolve())
    table = workbooks.to_jsonl(called, arrived)
    for note in table.notes:
        on_note(note)
    placed = place(arrived, data_dir)
    sheet_rows.keep(placed, name, table.sheet, table.starts)
    if table.others:
        shutil.copyfile(source, placed.with_name(f".{placed.name}{called.suffix}"))
        _sheet_file(placed).write_text(table.sheet, encoding="utf-8")
    return placed


_choosing = threading.Lock()  # between the choice of a sheet and the deletion of the workbook


def workbook_of(file: Path) -> Path | None:
    """The workbook from which a data file was made, which is kept if it had several sheets."""
    kept = (file.with_name(f".{file.name}{suffix}") for suffix in WORKBOOK_SUFFIXES)
    return next(filter(Path.is_file, kept), None)


def _sheet_file(file: Path) -> Path:
    """The file that records from which of its sheets a data file was made."""
    return file.with_name(f".{file.name}.sheet")


def sheets_of(file: Path) -> tuple[list[str], str]:
    """The sheets from which a data file can be made, and the current one; none if there is no choice."""
    workbook, chosen = workbook_of(file), _sheet_file(file)
    if workbook is None or not chosen.is_file():
        return [], ""
    return workbooks.tables(workbook), chosen.read_text(encoding="utf-8")


def choose_sheet(file: Path, sheet: str) -> list[Problem]:
    """Make a data file again, from another sheet of its workbook; returns what a person should know about how it was
    read.

    Raises Refusal if there is no such sheet.
    """
    workbook = workbook_of(file)
    if workbook is None:
        raise Refusal(problem("sheet-unknown", file=file.name, sheet=sheet, known="—"))
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=ARRIVING) as folder:
            arrived = Path(folder) / file.name
            called = Path(folder) / f"{file.stem}{workbook.suffix}"
            called.symlink_to(workbook.resolve())
            table = workbooks.to_jsonl(called, arrived, sheet)
            apply_umask(arrived)
            with _choosing:
                if workbook_of(file) is None:  # deleted while it was read: the previous sheet was chosen
                    raise Refusal(problem("sheet-unknown", file=file.name, sheet=sheet, known="—"))
                os.replace(arrived, file)
                name = sheet_rows.workbook_name(file) or called.name
                sheet_rows.keep(file, name, table.sheet, table.starts)
                _sheet_file(file).write_text(table.sheet, encoding="utf-8")
            return list(table.notes)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=file.parent, why=error.strerror or error)) from error


def forget_workbook(file: Path) -> None:
    """The sheet is chosen: delete the workbook."""
    with _choosing:
        for hidden in filter(None, (workbook_of(file), _sheet_file(file))):
            hidden.unlink(missing_ok=True)


def place(file: Path, data_dir: Path) -> Path:
    """Move a finished file on the same disk into the data folder, under its own name or the next free variant."""
    for name in _numbered_names(file.name):
        target = data_dir / name
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        sheet_rows.forget(target)  # of a file of that name that somebody has deleted
        os.replace(file, target)
        apply_umask(target)
        return target
    raise AssertionError("names do not end")


def _numbered_names(name: str) -> Iterator[str]:
    yield name
    stem, suffix = os.path.splitext(name)
    number = 1
    while True:
        number += 1
        yield f"{stem}-{number}{suffix}"


def safe_name(original_name: str) -> str:
    """A file name without folders or leading dots, of letters and digits of any script and a few other characters."""
    name = unicodedata.normalize("NFC", original_name).replace("\\", "/").rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.() -]+", "_", name).strip(" .")
    stem, suffix = os.path.splitext(name)
    while len(stem.encode()) > 150:  # file systems limit names to 255 bytes, and copies get a number
        stem = stem[:-1]
    return (stem.strip(" .") or "data") + suffix.lower()


def remove(data_dir: Path, name: str) -> None:
    """Delete a file that is in no data set, and the workbook kept for it; `name` is its path in the data folder.

    Raises Refusal if `check_removable` does, or if it cannot be deleted.
    """
    file = data_dir / name
    check_removable(data_dir, name)
    try:
        forget_workbook(file)
        sheet_rows.forget(file)
        file.unlink()
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=file.parent, why=error.strerror or error)) from error


def check_removable(data_dir: Path, name: str, besides: Collection[str] = ()) -> None:
    """Raises Refusal if the file `name` is in a data set `besides` those that are to go with it, is no data file, or if
    an entry of dataset_info.json cannot be read, which may use it."""
    file = data_dir / name
    datasets, broken = read_dataset_info(data_dir)
    datasets = [dataset for dataset in datasets if dataset.name not in besides]
    if name not in unregistered(data_dir, datasets) or not file.is_file():
        raise Refusal(problem("file-not-loose", name=name))
    unread = [wrong for wrong in broken if wrong.code != "catalogue-missing"]
    unusable = [dataset for dataset in datasets if dataset.problem and not dataset.files]
    unread += [dataset.problem for dataset in unusable if dataset.problem and _may_name(data_dir, dataset.name, file)]
    if unread:
        raise Refusal([problem("file-perhaps-used", name=name), *unread])


def _may_name(data_dir: Path, dataset: str, file: Path) -> bool:
    """Whether an entry of dataset_info.json that cannot be used names a file, or a folder or pattern with it."""
    entry = read_object(data_dir / INFO_FILE).get(dataset)
    named = entry.get("file_name") or [] if isinstance(entry, dict) else None
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return True
    parts = set(file.relative_to(data_dir).parts)
    return any(fnmatch(part, Path(name).name) for name in names for part in parts)


def unregistered(data_dir: Path, catalogue: Sequence[Dataset]) -> list[str]:
    """Data files in the data folder that are in no data set, and folders of images from which data files can be made,
    by their path inside it, newest first."""
    known = {file.resolve() for dataset in catalogue for file in dataset.files}
    candidates: list[Path] = []
    for folder, folders, files in os.walk(data_dir):
        here = Path(folder)
        depth = len(here.relative_to(data_dir).parts)
        folders[:] = [
            subfolder
            for subfolder in folders
            if not subfolder.startswith(".") and depth < 2 and not _is_model(folder, subfolder)
        ]
        if not depth:
            made_of, complete = _image_folders(data_dir, folders, catalogue)
            candidates += made_of
            folders[:] = [name for name in folders if here / name not in complete]
        for file in (here / name for name in files):
            if file.name.startswith(".") or file.suffix.lower() not in SUFFIXES or file.name == INFO_FILE:
                continue
            if _is_offered(file, data_dir) and file.resolve() not in known and not _is_beside_rows(file, data_dir):
                candidates.append(file)
    dated = sorted((-path.stat().st_mtime, str(path.relative_to(data_dir))) for path in candidates)
    return [name for _, name in dated[:MAX_FILES_LISTED]]


def _is_offered(path: Path, data_dir: Path) -> bool:
    """Whether a page can refer to it, and it is really in the data folder."""
    return path.exists() and is_encodable(path) and path.resolve().is_relative_to(data_dir.resolve())


def _image_folders(data_dir: Path, names: Sequence[str], catalogue: Sequence[Dataset]) -> tuple[list[Path], list[Path]]:
    """The folders among these of which rows can be made, except for those with the images of a data set; and those of
    them that have been seen completely, in which there is no data file."""
    inside = [folder for name in names if _is_offered(folder := data_dir / name, data_dir)]
    surveys = {folder: seen for folder in inside if (seen := image_folders.survey(folder)).makes_rows}
    used = _folders_with_images_of(catalogue, data_dir) if surveys else set()
    made_of = [folder for folder in surveys if folder not in used]
    return made_of, [folder for folder in made_of if surveys[folder].complete]


def _folders_with_images_of(catalogue: Sequence[Dataset], data_dir: Path) -> set[Path]:
    """The folders in the data folder with images to which the first rows of its data sets refer."""
    used = set()
    for dataset in catalogue:
        for file in filter(Path.is_file, dataset.files):
            for text in image_folders.image_paths(file, dataset.encoding):
                for path in (Path(os.path.normpath(start / text)) for start in (data_dir, file.parent)):
                    if data_dir in path.parents:
                        used.add(data_dir / path.relative_to(data_dir).parts[0])
    return used


def _is_beside_rows(file: Path, data_dir: Path) -> bool:
    """Whether it is metadata or a note in a folder of images whose rows are in another file, there or above."""
    if not (is_metadata(file) or file.suffix.lower() == ".txt"):
        return False
    above = [folder for folder in file.parents if data_dir in folder.parents]
    rows = (other for folder in above for other in folder.iterdir() if not other.name.startswith("."))
    return any(is_data_file(other, ()) for other in rows) and image_folders.has_images(file.parent)


def _is_model(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name, "config.json"))


def _megabytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MB"
