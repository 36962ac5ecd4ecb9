"""The data folder as shown on the page: its sets, and files that are in no set, with the ids `set:NAME` and
`file:PATH`. A draft of rows from documents, which is in the saves folder, has the id `draft:ID`.

A file is opened as the set that could be made from it. Names are looked up inside the data folder only, whoever sends
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.core.problems import Problem, Refusal, problem
from engine.data import dataset_info_edits, image_folders, uploads
from engine.data.datasets import Dataset, count_rows, dataset_of, find, read_dataset_info
from engine.data.encodings import encoding_key
from engine.data.owners import file_id, owner_of
from engine.data.soundness import sound_names


def is_set(id: str) -> bool:
    return id.startswith("set:")


def is_file(id: str) -> bool:
    return id.startswith("file:")


def is_draft(id: str) -> bool:
    return id.startswith("draft:")


def draft_id(id: str) -> str:
    """The id under which the page opens a draft of rows from documents."""
    return f"draft:{id}"


def name_of(id: str) -> str:
    """The name of the set, the path of the file, or the draft's own id."""
    return id.partition(":")[2]


@dataclass(frozen=True)
class Selection:
    """The open set or file."""

    id: str
    dataset: Dataset

    @property
    def is_set(self) -> bool:
        return is_set(self.id)

    @property
    def name(self) -> str:
        return name_of(self.id)

    @property
    def readable(self) -> bool:
        """Whether its files are on this machine, and its entry has no problems."""
        return bool(self.dataset.files) and not self.dataset.problem


@dataclass(frozen=True)
class DataFolder:
    path: Path

    def catalogue(self) -> tuple[list[Dataset], list[Problem]]:
        """All data sets, and the problems of the file that lists them."""
        return read_dataset_info(self.path)

    def sound_names(self) -> list[str]:
        """Names of the usable sets."""
        return sound_names(self.catalogue()[0])

    def loose_files(self) -> list[str]:
        """Paths of the files that are in no data set."""
        return uploads.unregistered(self.path, self.catalogue()[0])

    def select(self, id: str, encoding: str = "") -> Selection:
        """The set or file with an id; a file is read in this encoding, "" = as detected. Raises Refusal."""
        id = id or ""
        if is_set(id):
            return Selection(id, find(self.path, name_of(id)))
        name = name_of(id) if is_file(id) else ""
        if not name or name not in self.loose_files():
            raise Refusal(problem("set-unknown", name=name_of(id) or "—"))
        if (self.path / name).is_dir():
            raise Refusal(problem("imagefolder-no-rows", folder=name))
        return Selection(file_id(name), self._dataset_of_file(name, encoding))

    def owner(self, id: str) -> str:
        """Whose set or file it is; "" if it belongs to nobody."""
        return owner_of(self.path, id)

    def image_folder(self, id: str) -> str:
        """The path of the listed folder of images with this id; "" if it is none."""
        name = name_of(id or "") if is_file(id or "") else ""
        return name if name in self.loose_files() and (self.path / name).is_dir() else ""

    def make_rows(self, id: str) -> list[str]:
        """Write the data files of a listed folder of images into it; returns their paths, the one to train on first.
        Raises Refusal if that is not possible."""
        name = self.image_folder(id)
        if not name:
            raise Refusal(problem("set-unknown", name=name_of(id or "") or "—"))
        try:
            return [str(file.relative_to(self.path)) for file in image_folders.write_rows(self.path / name)]
        except OSError as error:
            raise Refusal(problem("data-not-writable", folder=self.path / name, why=error.strerror or error)) from error

    def _dataset_of_file(self, name: str, encoding: str) -> Dataset:
        encoding = encoding_key(encoding) if encoding else ""
        rows = dataset_info_edits.first_rows(self.path / name, encoding)
        try:
            entry = dataset_info_edits.entry_for_mapping(name, dataset_info_edits.propose(rows), rows)
        except Refusal:
            entry = {"file_name": name}
        return dataset_of(self.path, Path(name).stem, entry | {"encoding": encoding})

    def saved_set(self, id: str) -> Dataset:
        """The set with an id. Raises Refusal also for a file, because jobs use names, and a set may have the file's
        name."""
        selection = self.select(id)
        if not selection.is_set:
            raise Refusal(unsaved(selection))
        return selection.dataset


def unsaved(selection: Selection) -> Problem:
    """A file has to become a set before more can be done with it."""
    return problem("set-unsaved", file=selection.name)


def bytes_of(dataset: Dataset) -> int:
    return sum(file.stat().st_size for file in dataset.files)


def row_count(dataset: Dataset) -> int | None:
    """The number of rows, if it can be counted; a very large file is not read completely just for a list."""
    try:
        return count_rows(dataset)
    except (Refusal, OSError):
        return None
