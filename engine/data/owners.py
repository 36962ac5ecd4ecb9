"""Who owns the data sets and files of a data folder: those who uploaded, fetched, derived or described them.

One file in the data folder holds all of it, by the ids `set:NAME` and `file:PATH` (relative to the folder), next to
dataset_info.json, whose format is LLaMA-Factory's. What is not listed belongs to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import Refusal, problem
from engine.core.rundir import read_object, read_to_change, write_json
from engine.data.dataset_info import INFO_FILE

OWNERS_FILE = ".owners.json"


def set_id(name: str) -> str:
    return f"set:{name}"


def file_id(path: str) -> str:
    """The id of a file; `path` is relative to the data folder."""
    return f"file:{path}"


def owner_of(data_dir: Path, id: str) -> str:
    """The owner's name; "" if it belongs to nobody."""
    owner = read_object(data_dir / OWNERS_FILE).get(id, "")
    return owner if isinstance(owner, str) else ""


def owned_by(data_dir: Path, owner: str) -> list[str]:
    """The ids of everything that belongs to `owner`."""
    return [id for id, other in read_object(data_dir / OWNERS_FILE).items() if other == owner]


def claim(data_dir: Path, ids: Iterable[str], owner: str, instead_of: str = "") -> None:
    """Record the owner of what has just been made, "" for nobody; `instead_of` is an id that no longer exists. Raises
    Refusal if that cannot be written, or the others cannot be read."""
    changed = dict.fromkeys(ids, owner)
    path = data_dir / OWNERS_FILE
    try:
        if not owner and not path.exists():
            return
        lock = wait_for_lock(path.with_name(f"{OWNERS_FILE}.lock"))
        try:
            owners: dict[str, Any] = read_to_change(path, {})
            known = {id: other for id, other in owners.items() if id not in (*changed, instead_of)}
            write_json(path, known | (changed if owner else {}))
        finally:
            os.close(lock)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error


def claim_sets(data_dir: Path, names: Iterable[str], owner: str) -> None:
    """Record the owner of sets that have just been made, and of the file that was made for each. Raises Refusal."""
    made = list(names)
    entries = read_object(data_dir / INFO_FILE)
    files = [entries[name].get("file_name") for name in made if isinstance(entries.get(name), dict)]
    claim(data_dir, [*map(set_id, made), *(file_id(str(file)) for file in files if file)], owner)


def claim_result(arguments: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Record the owner of the sets and the file that a data job has made: whoever started it, if it knows that."""
    if "by" not in arguments:
        return
    data_dir, owner = Path(arguments["data"]), arguments["by"]
    claim_sets(data_dir, result.get("made", ()), owner)
    if "file" in result:
        claim(data_dir, [file_id(result["file"])], owner)
