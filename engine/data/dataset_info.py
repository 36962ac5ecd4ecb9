"""Read dataset_info.json in LLaMA-Factory's format: the data sets of a folder, and the problems of each.

An entry is checked against its files as far as that is quick. Unknown keys are reported, with the likely correct one if
it is similar. Rows are read by `engine.data.datasets`, and the file is changed by `engine.data.dataset_info_edits`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import Kind
from engine.data import columns, row_files
from engine.data.encodings import encoding_key
from engine.data.row_files import SUFFIXES, type_of
from engine.data.row_formats import COLUMN_ROLES, COLUMNS, MEDIA, ROLE_OF_TAG, SPEAKERS, TAGS
from engine.data.unpacking import PACKED_SUFFIXES
from engine.data.workbooks import WORKBOOK_SUFFIXES

INFO_FILE = "dataset_info.json"
SPLIT_NAMES = {  # as they occur in file names
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url")
KEY_TYPES: dict[str, tuple[type, str]] = {
    "file_name": (str, "string"),
    "formatting": (str, "string"),
    "columns": (dict, "object"),
    "tags": (dict, "object"),
    "num_samples": (int, "number"),
    "ranking": (bool, "true/false"),
    "folder": (str, "string"),
    "subset": (str, "string"),
    "split": (str, "string"),
    "encoding": (str, "string"),
}
# Keys of an entry: ours, and LLaMA-Factory's keys of sources that are not read here.
KNOWN_KEYS = (*KEY_TYPES, *HUB_KEYS, "script_url", "cloud_file_name")


@dataclass(frozen=True)
class Dataset:
    """One entry of dataset_info.json. `problem` says why it cannot be used. `hub` is the id of a set that is not on
    disk, and `folder` the part of it to download. `notes` are reported for an entry that can be used."""

    name: str
    kind: Kind = "chat"
    formatting: str = "alpaca"
    files: tuple[Path, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    hub: str = ""
    subset: str = ""
    split: str = "train"
    encoding: str = ""  # the encoding chosen by a person; "" = as marked or detected
    problem: Problem | None = None
    folder: str = ""
    notes: tuple[Problem, ...] = ()
    root: Path | None = None  # the data folder, which contains its images

    @cached_property
    def speakers(self) -> dict[str, str]:
        """The roles defined by the entry's tags: name in the data → role."""
        return {self.tags[tag]: role for tag, role in ROLE_OF_TAG.items() if self.tags.get(tag)}

    @cached_property
    def used(self) -> frozenset[str]:
        """The columns that have a role."""
        return frozenset(self.columns.values())

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns from which rows of its kind are made."""
        beside = {role for role in columns.ROLES[self.kind] if role != "messages"}
        roles = beside if self.formatting == "alpaca" else set(columns.BESIDE_MESSAGES) & {*beside, "messages"}
        names = {column for role, column in self.columns.items() if role in roles or role in ("weight", "images")}
        if "tools" in roles & self.columns.keys():
            names.add("functions")  # OpenAI's older name
        if any(file.suffix == ".txt" for file in self.files):
            names.add("text")
        return frozenset(names)

    @cached_property
    def media(self) -> tuple[str, ...]:
        """LLaMA-Factory's columns for images, videos and audio that the entry has."""
        return tuple(role for role in MEDIA if role in self.columns)

    def role_of(self, speaker: Any) -> str | None:
        """The role of a speaker, by the entry's tags or the common names; None if unknown."""
        if not isinstance(speaker, str):
            return None
        return self.speakers.get(speaker) or SPEAKERS.get(speaker.strip().casefold())


def read_dataset_info(data_dir: Path) -> tuple[list[Dataset], list[Problem]]:
    """The data sets of a folder, in the order of its file, and the problems of the file as a whole.

    An entry that cannot be used stays in the list with its `problem`. Never raises because of the file's content.
    """
    path = data_dir / INFO_FILE
    if not path.is_file():
        return [], [problem("catalogue-missing", file=str(path))]
    try:
        entries = json.loads(row_files.read_text(path))
    except (RecursionError, ValueError) as error:
        return [], [problem("catalogue-broken", file=str(path), **row_files.json_error_location(error))]
    except OSError as error:
        return [], [problem("data-file-unreadable", file=str(path), why=error.strerror or error)]
    except Refusal as refusal:
        return [], refusal.problems
    if not isinstance(entries, dict):
        return [], [problem("catalogue-not-object", file=str(path), found=type_of(entries))]
    return [dataset_of(data_dir, name, entry) for name, entry in entries.items()], []


def find(data_dir: Path, name: str) -> Dataset:
    """One data set of a folder. Raises Refusal if it does not exist, or if the file is broken."""
    datasets, broken = read_dataset_info(data_dir)
    for dataset in datasets:
        if dataset.name == name:
            return dataset
    raise Refusal(broken or problem("set-unknown", name=name))


def dataset_of(data_dir: Path, name: str, entry: Any) -> Dataset:
    """The data set of an entry, with its problem if it cannot be used. Raises nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half a character, which no page and no file can store
        name = name.encode(errors="backslashreplace").decode()
        return Dataset(name, problem=problem("set-name-half", name=name))
    try:
        return _read_entry(data_dir, name, entry)
    except Refusal as refusal:
        return Dataset(name, problem=refusal.problems[0])
    # A name that is too long or contains a NUL; circular links.
    except (OSError, ValueError, RuntimeError) as error:
        values = {"key": "file_name", "expected": "file name", "found": error}
        return Dataset(name, problem=problem("entry-value", name=name, **values))


def _read_entry(data_dir: Path, name: str, entry: Any) -> Dataset:
    _check_types(name, entry)
    notes = _unread_key_notes(name, entry)
    hub = next((entry[key] for key in HUB_KEYS if entry.get(key)), "")
    if not entry.get("file_name") and not hub:
        raise Refusal(problem("entry-without-file", name=name, keys=_comma_separated(entry)))
    folder, subset, split = (str(entry.get(key) or "") for key in ("folder", "subset", "split"))
    files: tuple[Path, ...] = ()
    if entry.get("file_name"):
        files = _files_of_split(name, _files(data_dir, name, entry["file_name"], folder, subset), split)
    encoding = encoding_key(entry["encoding"]) if entry.get("encoding") else ""
    if files and not {"formatting", "columns"} & set(entry):  # it does not describe its rows
        if wrong := file_problem(files[0], encoding):
            return Dataset(name, files=files, encoding=encoding, problem=wrong)
        guessed, unlike = columns.guess_entry(files[0], encoding)
        entry = guessed | entry
        if unlike:
            notes.append(problem("guess-uneven", name=name, **unlike))
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in COLUMNS:
        raise Refusal(problem("entry-formatting", name=name, found=formatting, known=_comma_separated(COLUMNS)))
    mapped = {role: column for role, column in (entry.get("columns") or {}).items() if isinstance(column, str)}
    roles = mapped or COLUMNS[formatting]
    if formatting != "alpaca":
        roles = {"messages": COLUMNS[formatting]["messages"], **roles}
    return Dataset(
        name=name,
        kind=_kind(entry, formatting, roles, files),
        formatting=formatting,
        files=files,
        columns=roles,
        tags=TAGS.get(formatting, TAGS["openai"]) | _set_tags(entry.get("tags")),
        num_samples=entry.get("num_samples"),
        hub="" if files else str(hub),
        subset=subset,
        split=split or "train",
        encoding=encoding,
        folder=folder,
        notes=tuple(notes),
        root=data_dir,
    )


def _set_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    return {tag: name for tag, name in (tags or {}).items() if name is not None}


def _check_types(name: str, entry: Any) -> None:
    _require_type(entry, dict, name=name, key="", expected="object")
    for key, (shape, expected) in KEY_TYPES.items():
        if entry.get(key) is not None:
            _require_type(entry[key], shape, name=name, key=key, expected=expected)
    for tag, written in (entry.get("tags") or {}).items():
        if written is not None:
            _require_type(written, str, name=name, key=f"tags.{tag}", expected="string")
    if entry.get("num_samples") is not None and entry["num_samples"] < 1:
        values = {"key": "num_samples", "expected": "≥ 1", "found": entry["num_samples"]}
        raise Refusal(problem("entry-value", name=name, **values))


def _unread_key_notes(name: str, entry: Mapping[str, Any]) -> list[Problem]:
    """Notes about unknown keys, column roles and tags. Raises Refusal if one is clearly a misspelling."""
    unread = []
    for where, names, known in (
        ("", entry, KNOWN_KEYS),
        ("columns.", entry.get("columns") or {}, COLUMN_ROLES),
        ("tags.", entry.get("tags") or {}, tuple(TAGS["openai"])),
    ):
        for key in names:
            if key in known:
                continue
            if near := difflib.get_close_matches(key.casefold(), known, n=1, cutoff=0.8):
                values = {
                    "key": f"{where}{key}",
                    "meant": f"{where}{near[0]}",
                    "known": _comma_separated(known),
                }
                raise Refusal(problem("entry-key-misspelt", name=name, **values))
            unread.append(f"{where}{key}")
    return [problem("entry-keys-unread", name=name, keys=_comma_separated(unread))] if unread else []


def _kind(entry: Mapping[str, Any], formatting: str, roles: Mapping[str, str], files: Sequence[Path]) -> Kind:
    if entry.get("ranking"):
        return "pairs"
    if "kto_tag" in roles:
        return "thumbs"
    if formatting == "alpaca" and ("response" not in roles or any(file.suffix == ".txt" for file in files)):
        return "text"
    return "chat"


def _files(data_dir: Path, name: str, file_name: str, folder: str, subset: str) -> tuple[Path, ...]:
    """A file, or the files of a folder. If that is a copy of a hub's repository, `folder` is a folder in it, and
    `subset` the folder of that name inside it; for a single file neither has a meaning, as in LLaMA-Factory.

    Raises Refusal if there is nothing, or if it is outside the data folder once links are resolved.
    """
    root, path = data_dir.resolve(), data_dir / file_name
    if not path.is_file():
        path = path / folder / subset
    if not path.resolve().is_relative_to(root):
        raise Refusal(problem("file-outside", name=name, file=file_name, folder=str(data_dir)))
    if not path.exists():
        raise Refusal(problem("file-missing", name=name, file=str(path)))
    if path.suffix.lower() in (*PACKED_SUFFIXES, *WORKBOOK_SUFFIXES):
        raise Refusal(problem("file-packed", name=name, file=str(path), known=_comma_separated(SUFFIXES)))
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = tuple(file for file in inside if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise Refusal(problem("file-format", name=name, file=str(path), known=_comma_separated(SUFFIXES)))
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            shown = file.name.encode(errors="backslashreplace").decode()
            raise Refusal(problem("file-name-half", name=name, file=shown)) from None
        if not file.resolve().is_relative_to(root):
            raise Refusal(problem("file-outside", name=name, file=file.name, folder=str(data_dir)))
    return files


def _files_of_split(name: str, files: tuple[Path, ...], split: str) -> tuple[Path, ...]:
    """The files of `split`, recognized by their names as in the datasets library: test-00000-of-00002.parquet,
    my_test.json.

    Without `split`, the training files, or all files if no name identifies any. Raises Refusal for a given split that
    no file has.
    """
    chosen = split or "train"
    words = "|".join(map(re.escape, SPLIT_NAMES.get(chosen, (chosen,))))
    # no letter before or after it
    named = re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE)
    matching = tuple(file for file in files if named.search(file.stem))
    if split and split != "train" and not matching:
        raise Refusal(problem("split-missing", name=name, split=split, files=_comma_separated(f.name for f in files)))
    return matching or files


def file_problem(file: Path, encoding: str = "") -> Problem | None:
    """Why no row of a file can be read, if so."""
    _, first = next(row_files.entries(file, encoding=encoding), (None, None))
    whole = isinstance(first, Problem) and first.code.startswith(("file-", "data-file-"))
    return first if whole else None


def _require_type(value: Any, shape: type, **values: Any) -> None:
    if not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
        raise Refusal(problem("entry-value", found=type_of(value), **values))


def _comma_separated(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "—"
