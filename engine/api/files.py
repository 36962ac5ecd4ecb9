"""Files of the interface: each is a data set of the data folder, with a small record of how it was uploaded.

The record is `.api/<file id>.json` in the data folder; the file itself and its entry in dataset_info.json are like
those of any upload, so the page shows, checks and renames them. A data set of the page can be named where an id is
expected.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.api.callers import Caller
from engine.api.errors import ApiError, not_found
from engine.core.problems import Refusal, problem
from engine.core.rights import may
from engine.core.rundir import read_object, stamp, write_json
from engine.data import columns, dataset_info_edits, owners, uploads
from engine.data.dataset_info import Dataset, read_dataset_info
from engine.launch.workspace import Workplace
from engine.runs import index
from engine.runs.runs import refusing_write_errors

RECORDS_FOLDER = ".api"  # inside the data folder
PURPOSE = "fine-tune"
SUFFIX = ".jsonl"
ID_PATTERN = re.compile(r"file-[0-9a-f]{24}")
# Rows that do not show what they are, such as a file whose first line is damaged, are read as conversations.
CHAT_ENTRY = {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}


@dataclass(frozen=True)
class File:
    """A file, by its data set. `owner`: who uploaded it; of a data set of the page, the owner of that."""

    id: str
    name: str  # as uploaded
    owner: str
    created: float
    dataset: Dataset

    @property
    def path(self) -> Path:
        return self.dataset.files[0]

    def as_object(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return file_object(self.id, self.name, self.path.stat().st_size, self.created, PURPOSE)


def file_object(id: str, name: str, size: int, created: float, purpose: str) -> dict[str, Any]:
    """OpenAI's file object. Row by row, a file is only checked by a job."""
    return {
        "id": id,
        "object": "file",
        "bytes": size,
        "created_at": int(created),
        "expires_at": None,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


def store(workplace: Workplace, source: Path, name: str, caller: Caller) -> File:
    """Take an uploaded file into the data folder and add it to the data sets. Raises ApiError or Refusal."""
    if not name.lower().endswith(SUFFIX):
        raise ApiError(400, problem("api-file-format", file=name[:100]), "file", "invalid_file_format")
    with caller.acting(workplace.saves, "upload", name):
        path = uploads.receive(source, name, workplace.data)
        owners.claim(workplace.data, [owners.file_id(path.name)], caller.name)
        entry = columns.guess_entry(path)[0] or _default_entry(path)
        stem = re.sub(r"[,\s]+|\.{2,}", "_", path.stem)[: dataset_info_edits.MAX_NAME_LENGTH - 8]
        added = dataset_info_edits.add(workplace.data, stem, {"file_name": path.name, **entry})
        owners.claim(workplace.data, [owners.set_id(added)], caller.name)
        id = f"file-{secrets.token_hex(12)}"
        record = {"filename": name[:255], "created": time.time(), "file": path.name, "stamp": stamp([path])}
        folder = workplace.data / RECORDS_FOLDER
        with refusing_write_errors(workplace.data):
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{id}.json", record)
    return find(workplace, id, caller)


def _default_entry(path: Path) -> dict[str, Any]:
    """The entry of rows in the default format, which no entry describes, or of rows without a known form."""
    plain = {"instruction", "output"} <= set(columns.columns_of(columns.first_rows(path)))
    return {} if plain else CHAT_ENTRY


def uploaded(workplace: Workplace) -> list[File]:
    """Everybody's files, newest first. Those whose file or data set has been removed on the page are left out."""
    datasets: dict[str, Dataset] = {}  # of one file in the data folder itself, by the file's name
    for dataset in read_dataset_info(workplace.data)[0]:
        if len(dataset.files) == 1 and dataset.files[0].parent == workplace.data:
            name = dataset.files[0].name
            if name not in datasets or datasets[name].problem:
                datasets[name] = dataset
    owned = read_object(workplace.data / owners.OWNERS_FILE)
    records = sorted((workplace.data / RECORDS_FOLDER).glob("file-*.json"))
    files = [file for path in records if ID_PATTERN.fullmatch(path.stem) and (file := _file(path, datasets, owned))]
    return sorted(files, key=lambda file: file.created, reverse=True)


def _file(path: Path, datasets: Mapping[str, Dataset], owned: Mapping[str, Any]) -> File | None:
    record = read_object(path)
    name, created = record.get("file"), record.get("created")
    if not isinstance(name, str) or not isinstance(created, (int, float)) or name not in datasets:
        return None
    # Another file may have got the name of one that was removed, and belong to somebody else.
    if record.get("stamp") != stamp(datasets[name].files):
        return None
    owner = str(owned.get(owners.file_id(name), ""))  # anybody may describe another set of the same file
    return File(path.stem, str(record.get("filename") or name), owner, created, datasets[name])


def find(workplace: Workplace, id: str, caller: Caller, param: str = "file_id") -> File:
    """The file with this id, or the data set with this name: the caller's, or nobody's. Raises ApiError if there is
    none; `param` is the argument that named it."""
    for file in uploaded(workplace):
        if file.id == id and caller.sees(file.owner):
            return file
    for dataset in read_dataset_info(workplace.data)[0]:
        if dataset.name == id and len(dataset.files) == 1 and dataset.problem is None:
            owner = owners.owner_of(workplace.data, owners.set_id(id))
            if not owner or caller.sees(owner):
                path = dataset.files[0]
                return File(id, path.name, owner, path.stat().st_mtime, dataset)
    raise not_found("api-no-file", id, param)


def ids_by_dataset(workplace: Workplace) -> dict[str, str]:
    """The ids of uploaded files by the names of their data sets; other data sets are called by their names."""
    ids = {file.path: file.id for file in uploaded(workplace)}
    datasets = read_dataset_info(workplace.data)[0]
    return {
        dataset.name: ids[dataset.files[0]]
        for dataset in datasets
        if len(dataset.files) == 1 and dataset.files[0] in ids
    }


def delete(workplace: Workplace, file: File, caller: Caller) -> None:
    """Delete the file, its data sets and its record. Raises ApiError while a job waits for it, or for a data set that
    was not uploaded here; Refusal."""
    if not ID_PATTERN.fullmatch(file.id):
        raise ApiError(400, problem("api-file-of-page", name=file.id), "file_id")
    name = file.path.relative_to(workplace.data).as_posix()
    names = [dataset.name for dataset in read_dataset_info(workplace.data)[0] if file.path in dataset.files]
    for run in index.open_runs(workplace.saves):
        if not run.final and set(names) & set(run.facts.data):
            raise ApiError(409, problem("api-file-in-use", run=run.title), "file_id")
    with caller.acting(workplace.saves, "remove-data", file.dataset.name, file.owner):
        for set_name in names:
            if hindrance := may(caller.person, "remove-data", owners.owner_of(workplace.data, owners.set_id(set_name))):
                raise Refusal(hindrance)
        uploads.check_removable(workplace.data, name, names)
        for set_name in names:
            with contextlib.suppress(Refusal):  # removed on the page in the meantime
                dataset_info_edits.remove(workplace.data, set_name)
        uploads.remove(workplace.data, name)
        (workplace.data / RECORDS_FOLDER / f"{file.id}.json").unlink(missing_ok=True)
        owners.claim(workplace.data, [*map(owners.set_id, names), owners.file_id(file.path.name)], "")
