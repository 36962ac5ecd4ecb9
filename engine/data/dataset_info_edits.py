"""Change dataset_info.json: add, describe, rename and remove data sets, leaving everything else in it unchanged.

A description says what the rows of a data file are and which role each column has; `engine.data.columns` guesses one.
Reading the file is left to `engine.data.dataset_info`.
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import Refusal, problem
from engine.core.rundir import write_text
from engine.data import columns, row_files
from engine.data.columns import ROLES, SUFFICIENT_ROLES, ColumnMapping, columns_of, first_rows, propose
from engine.data.dataset_info import INFO_FILE, Dataset

__all__ = [
    "ROLES",
    "ColumnMapping",
    "add",
    "columns_of",
    "derived_entry",
    "entry_for_mapping",
    "entry_of",
    "first_rows",
    "mapping_of",
    "propose",
    "remove",
    "save",
    "valid_name",
]

MAX_NAME_LENGTH = 100


# --------------------------------------------------------------------------------------------- what rows are


def mapping_of(dataset: Dataset) -> ColumnMapping:
    """The mapping in the entry of a data set."""
    roles = ROLES[dataset.kind]
    return ColumnMapping(dataset.kind, {role: column for role, column in dataset.columns.items() if role in roles})


def entry_for_mapping(
    file_name: str, mapping: ColumnMapping, rows: list[dict[str, Any]], before: Any = None
) -> dict[str, Any]:
    """The entry for this mapping, with everything else that the entry `before` had. Raises Refusal if something is
    missing."""
    chosen = {role: mapping.columns[role] for role in ROLES[mapping.kind] if mapping.columns.get(role)}
    available = columns_of(rows)
    if unknown := [column for column in chosen.values() if available and column not in available]:
        raise Refusal(problem("mapping-unknown", column=unknown[0], columns=", ".join(available)))
    if not any(set(enough) <= set(chosen) for enough in SUFFICIENT_ROLES[mapping.kind]):
        parts = " / ".join(" + ".join(enough) for enough in SUFFICIENT_ROLES[mapping.kind])
        raise Refusal(problem("mapping-incomplete", parts=parts, columns=", ".join(available) or "—"))
    previous = {} if not isinstance(before, dict) else before
    drop = ("file_name", "formatting", "columns", "tags", "ranking")
    entry: dict[str, Any] = {"file_name": file_name} | {key: previous[key] for key in previous if key not in drop}
    entry |= columns.dataset_info_entry(mapping, rows)
    images = (previous.get("columns") or {}).get("images")
    if images and "columns" in entry:
        entry["columns"]["images"] = images
    if "messages" in chosen and "tags" not in entry and previous.get("tags"):
        entry["tags"] = previous["tags"]
    return entry


# ---------------------------------------------------------------------------------------------- the file


def add(data_dir: Path, name: str, entry: dict[str, Any]) -> str:
    """Add an entry under `name`, or the next free variant of it; returns the name."""
    with _edited_entries(data_dir) as entries:
        free, number = name, 1
        while free in entries:
            number += 1
            free = f"{name}-{number}"
        entries[free] = entry
    return free


def save(data_dir: Path, name: str, entry: dict[str, Any], instead_of: str = "") -> str:
    """Store an entry under `name`, replacing the one called `instead_of`; returns the stored name.

    Raises Refusal if the name is invalid, or is another set's.
    """
    name = valid_name(name)
    with _edited_entries(data_dir) as entries:
        if name in entries and name != instead_of:
            raise Refusal(problem("set-name-taken", name=name))
        if instead_of in entries:
            renamed = {name if key == instead_of else key: value for key, value in entries.items()}
            entries.clear()
            entries.update(renamed)
        entries[name] = entry
    return name


def remove(data_dir: Path, name: str) -> None:
    """Remove an entry. Its files stay. Raises Refusal if there is none."""
    with _edited_entries(data_dir) as entries:
        if name not in entries:
            raise Refusal(problem("set-unknown", name=name))
        del entries[name]


def entry_of(data_dir: Path, name: str) -> dict[str, Any]:
    """The entry of a set. Raises Refusal if there is none, or the file is broken."""
    entry = _read_entries(data_dir).get(name)
    if not isinstance(entry, dict):
        raise Refusal(problem("set-unknown", name=name))
    return entry


def derived_entry(entry: dict[str, Any], dataset: Dataset, file_name: str) -> dict[str, Any]:
    """The entry of a file whose rows are some of the data set's."""
    gone = (
        "file_name",
        "num_samples",
        "hf_hub_url",
        "ms_hub_url",
        "om_hub_url",
        "subset",
        "split",
        "folder",
        "encoding",
    )
    kept = {key: value for key, value in entry.items() if key not in gone}
    if dataset.kind == "text" and "columns" not in kept:
        kept["columns"] = {"prompt": "text"}
    return {"file_name": file_name, **kept}


def valid_name(text: str) -> str:
    """The name of a data set without surrounding spaces. Raises Refusal if it is invalid."""
    name = unicodedata.normalize("NFC", text).strip()
    looks_like_path = ".." in name or name.startswith((".", "/", "\\"))
    if not name or len(name) > MAX_NAME_LENGTH or "," in name or not name.isprintable() or looks_like_path:
        raise Refusal(problem("set-name", name=name[:MAX_NAME_LENGTH] or "—", limit=MAX_NAME_LENGTH))
    return name


@contextlib.contextmanager
def _edited_entries(data_dir: Path) -> Iterator[dict[str, Any]]:
    """The entries, to be changed by one caller at a time; written back as a whole or, after an error, not at all."""
    try:
        lock = wait_for_lock(data_dir / f".{INFO_FILE}.lock")
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror)) from error
    try:
        entries = _read_entries(data_dir)
        yield entries
        text = json.dumps(entries, ensure_ascii=False, indent=2) + "\n"
        write_text((data_dir / INFO_FILE).resolve(), text)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror)) from error
    finally:
        os.close(lock)


def _read_entries(data_dir: Path) -> dict[str, Any]:
    """The file as it is; {} if there is none. Raises Refusal if it is broken, because then nothing may be written."""
    path = data_dir / INFO_FILE
    if not path.exists():
        return {}
    try:
        entries = json.loads(row_files.read_text(path))
    except (RecursionError, ValueError) as error:
        values = row_files.json_error_location(error)
        raise Refusal(problem("catalogue-broken", file=str(path), **values)) from None
    if not isinstance(entries, dict):
        raise Refusal(problem("catalogue-not-object", file=str(path), found=row_files.type_of(entries)))
    return entries
