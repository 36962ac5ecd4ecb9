"""A folder of images in the implicit form of the datasets library (ImageFolder) → data files with rows for SFT.

Either each folder has the name of its images' label, or `metadata.csv` or `metadata.jsonl` next to the images names
each in a column `file_name`. A row asks the question that the metadata has, if any, about the image, and is answered by
the label or text. Folders called train, test and so on become a data file each.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from engine.core import rundir
from engine.core.problems import Problem, Refusal, problem
from engine.data import row_files
from engine.data.columns import USUAL_COLUMN_NAMES, first_turns
from engine.data.dataset_info import SPLIT_NAMES
from engine.data.images import IMAGE_SUFFIXES, is_metadata
from engine.data.row_images import TEXT_MARK

FILE_COLUMN = "file_name"
ANSWER_NAMES = (
    *USUAL_COLUMN_NAMES["response"],
    "text",
    "caption",
    "label",
    "class",
    "category",
    "描述",
    "标签",
    "类别",
)
MAX_FILES_SEEN = 20_000  # to find out what is in a folder
ROWS_SEEN = 20  # of a data file, to find out where its images are
DATA_FILES = ("train.jsonl", "rows.jsonl")  # the one to train on
SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names}


@dataclass(frozen=True)
class Survey:
    """What is in a folder. `makes_rows`: rows can be made of it, because it has images in folders with different names,
    or metadata, and no data file. `complete`: all of it was seen; of a very large one, only the first files are."""

    makes_rows: bool
    complete: bool


def survey(folder: Path) -> Survey:
    """What is in a folder, as far as the first MAX_FILES_SEEN files show."""
    described, labels, seen = False, set(), 0
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(names)
        files = [Path(path, name) for name in names if not name.startswith(".")]
        pictures = {file.stem for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        if any(is_data_file(file, pictures) for file in files):
            return Survey(False, True)
        described |= any(map(is_metadata, files))
        labels |= {Path(path).name} if pictures and Path(path) != folder else set()
        if seen > MAX_FILES_SEEN:
            break
    # A folder whose images are all in one other is just where they are kept: its name tells nothing about any of them.
    return Survey(described or len(labels) > 1, seen <= MAX_FILES_SEEN)


def is_data_file(file: Path, pictures: Collection[str]) -> bool:
    """Whether a file in a folder of images has rows. Texts are notes on the images (classes.txt, README.txt), unless
    they are called like one of the `pictures` next to them, without suffix: those are captions."""
    suffix = file.suffix.lower()
    if suffix == ".txt":
        return file.stem in pictures
    return suffix in row_files.SUFFIXES and not is_metadata(file)


def has_images(folder: Path) -> bool:
    """Whether there is an image among the first files of a folder and those below."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in islice(names, MAX_FILES_SEEN))


def image_paths(file: Path, encoding: str = "") -> tuple[str, ...]:
    """The paths of images in the first rows of a data file; cached until it changes."""
    return _image_paths(file, encoding, *row_files.version(file))


@lru_cache(maxsize=1024)
def _image_paths(file: Path, encoding: str, mtime_ns: int, size: int) -> tuple[str, ...]:
    if file.suffix.lower() not in (".json", ".jsonl", ".csv", ".tsv"):
        return ()  # a table in Parquet usually has the images themselves, and would have to be read with them
    rows = (row for _, row in islice(row_files.entries(file, encoding=encoding), ROWS_SEEN))
    return tuple(text for row in rows for text in _texts(row) if text.lower().endswith(IMAGE_SUFFIXES))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def write_rows(folder: Path) -> list[Path]:
    """Write the data files of a folder of images into it, all or none; returns them, the one to train on first. Raises
    Refusal if its images have no labels, or a row cannot be used, and OSError if nothing can be written."""
    files: dict[str, list[dict[str, Any]]] = {}
    metadata = [file for file in _files(folder) if is_metadata(file)]
    pairs = _described(folder, metadata) if metadata else _labelled(folder)
    for path, row in pairs:
        inside = path.relative_to(folder)
        if not is_encodable(inside):
            raise Refusal(problem("imagefolder-name", file=inside))
        files.setdefault(SPLITS.get(inside.parts[0].casefold(), ""), []).append(row)
    if not files:
        raise Refusal(problem("imagefolder-empty", folder=folder.name))
    texts = {
        _data_file(folder, split): "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in files.items()
    }
    _write_all(texts)
    return sorted(texts, key=lambda file: file.name not in DATA_FILES)


def _write_all(texts: Mapping[Path, str]) -> None:
    """Write these files; none of them remains if one cannot be written. Raises FileExistsError rather than overwrite
    one, which may have come since the folder was looked at."""
    if taken := next((file for file in texts if os.path.lexists(file)), None):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), taken)
    written: list[Path] = []
    try:
        for file, text in texts.items():
            rundir.write_text(file, text)
            written.append(file)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise


def is_encodable(path: Path) -> bool:
    """Whether a path is UTF-8: no page and no data file could refer to another one."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _data_file(folder: Path, split: str) -> Path:
    return folder / f"{split or 'rows'}.jsonl"


def _files(folder: Path) -> list[Path]:
    """The files in a folder and below that are neither hidden nor links out of it, sorted."""
    files: list[Path] = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(path, name) for name in names if not name.startswith("."))
    root = folder.resolve()
    return sorted(file for file in files if not file.is_symlink() or file.resolve().is_relative_to(root))


def _labelled(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The images in folders named by their label."""
    for path in _files(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            label = path.parent.name
            inside = path.relative_to(folder).parts[:-1]
            if not inside or (len(inside) == 1 and label.casefold() in SPLITS):
                raise Refusal(problem("imagefolder-no-labels", file=path.name))
            yield path, _row(folder, path, "", label)


def _described(folder: Path, metadata: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The images that the rows of these files name."""
    for file in metadata:
        for place, row in row_files.entries(file):
            if isinstance(row, Problem):
                raise Refusal(row)
            name = row.get(FILE_COLUMN)
            if not isinstance(name, str) or not name:
                raise Refusal(problem("imagefolder-no-file", place=str(place), column=FILE_COLUMN))
            path = Path(os.path.normpath(file.parent / name))
            if folder not in path.parents:
                raise Refusal(problem("imagefolder-outside", place=str(place), image=name, folder=folder.name))
            yield path, _row_of_metadata(folder, path, row, place)


def _row_of_metadata(folder: Path, path: Path, row: Mapping[str, Any], place: row_files.Place) -> dict[str, Any]:
    others = {column: value for column, value in row.items() if column != FILE_COLUMN}
    turns = next((column for column in others if first_turns([dict(row)], column)), None)
    if turns:
        rest = {column: value for column, value in others.items() if column != turns}
        return {turns: _with_mark(others[turns]), "images": [str(path.relative_to(folder))], **rest}
    known = {column.casefold(): column for column in others}
    question = next((known[each] for each in USUAL_COLUMN_NAMES["prompt"] if each in known), None)
    answers = [known[each] for each in ANSWER_NAMES if each in known and known[each] != question]
    if not answers:
        values = {"columns": ", ".join(row), "known": ", ".join(ANSWER_NAMES)}
        raise Refusal(problem("imagefolder-no-answers", place=str(place), **values))
    answer = next((column for column in answers if not _is_empty(others[column])), None)
    if answer is None:
        raise Refusal(problem("imagefolder-answer-empty", place=str(place), columns=", ".join(answers)))
    text = others.pop(question) if question else ""
    return _row(folder, path, text, others.pop(answer)) | others


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _with_mark(turns: Any) -> Any:
    """Turns whose first one from the user shows the image, if none has a mark for it."""
    listed = json.loads(turns) if isinstance(turns, str) else turns
    if TEXT_MARK in json.dumps(listed, ensure_ascii=False):
        return listed
    for turn in listed:
        content = next((key for key in ("content", "value") if isinstance(turn.get(key), str)), None)
        if content and turn.get("role", turn.get("from")) in ("user", "human"):
            turn[content] = TEXT_MARK + turn[content]
            break
    return listed


def _row(folder: Path, path: Path, question: Any, answer: Any) -> dict[str, Any]:
    text = str(question or "")
    marked = text if TEXT_MARK in text else TEXT_MARK + text
    return {"instruction": marked, "output": str(answer), "images": [str(path.relative_to(folder))]}
