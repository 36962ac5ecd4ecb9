"""The entry of a set in dataset_info.json, from the page's controls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import Kind
from engine.data import dataset_info_edits
from engine.data.dataset_info_edits import ROLES, ColumnMapping
from engine.data.datasets import Dataset
from engine.data.encodings import encoding_key
from webui.data_tab.data_folder import DataFolder
from webui.words import Words

ALL_ROLES = ("prompt", "query", "response", "chosen", "rejected", "kto_tag", "messages", "history", "system", "tools")


@dataclass(frozen=True)
class Description:
    """The values of the controls: the kind of the rows, the encoding ("" = as detected), a column for each of ALL_ROLES
    ("" = none)."""

    kind: str
    encoding: str
    columns: Sequence[str]

    @property
    def mapping(self) -> ColumnMapping:
        columns = zip(ALL_ROLES, self.columns, strict=True)
        return ColumnMapping(known_kind(self.kind), {role: str(column) for role, column in columns if column})


def known_kind(kind: str) -> Kind:
    return next((known for known in ROLES if known == kind), "chat")


def entry_from(folder: DataFolder, id: str, description: Description, words: Words) -> tuple[Dataset, dict[str, Any]]:
    """The current set or file, and its new entry. Raises Refusal if something is missing."""
    encoding = encoding_key(description.encoding) if description.encoding else ""
    selection = folder.select(id, encoding)
    dataset = selection.dataset
    if not dataset.files:
        raise Refusal(dataset.problem or problem("dataset-on-hub", name=dataset.name, hub=dataset.hub))
    before = dict(dataset_info_edits.entry_of(folder.path, dataset.name)) if selection.is_set else {}
    before.pop("encoding", None)
    file_name = before.get("file_name") or selection.name
    rows = dataset_info_edits.first_rows(dataset.files[0], encoding)
    try:
        entry = dataset_info_edits.entry_for_mapping(file_name, description.mapping, rows, before)
    except Refusal as refusal:
        raise Refusal([_with_role_labels(refused, words) for refused in refusal.problems]) from None
    return dataset, entry | ({"encoding": encoding} if encoding else {})


def _with_role_labels(refused: Problem, words: Words) -> Problem:
    """The problem with roles of columns under their labels on the page."""
    if "parts" not in refused.values:
        return refused
    parts = re.sub(r"\w+", lambda role: words(f"role-{role[0]}"), refused.values["parts"])
    return replace(refused, values={**refused.values, "parts": parts})


def columns_for(dataset: Dataset) -> tuple[list[str], dict[str, str]]:
    """The columns of the first file, and those with a role in the set's entry."""
    existing = dataset_info_edits.columns_of(dataset_info_edits.first_rows(dataset.files[0], dataset.encoding))
    mapping = dataset_info_edits.mapping_of(dataset)
    return existing, {role: column for role, column in mapping.columns.items() if column in existing}


def columns_for_kind(dataset: Dataset, description: Description) -> tuple[list[str], dict[str, str]]:
    """The columns of the first file, and one for each role: the previous choice, otherwise a guess. Raises Refusal if
    the file cannot be read."""
    rows = dataset_info_edits.first_rows(dataset.files[0], description.encoding or "")
    existing = dataset_info_edits.columns_of(rows)
    guessed = dataset_info_edits.propose(rows).columns if rows else {}
    chosen = dict(zip(ALL_ROLES, description.columns, strict=True))
    return existing, {
        role: column if column and column in existing else guessed.get(role, "") for role, column in chosen.items()
    }


def columns_in_encoding(dataset: Dataset) -> tuple[list[str], ColumnMapping]:
    """The columns of the first file in the set's encoding, and the guessed roles."""
    rows = dataset_info_edits.first_rows(dataset.files[0], dataset.encoding)
    mapping = dataset_info_edits.propose(rows) if rows else ColumnMapping("chat")
    return dataset_info_edits.columns_of(rows), mapping
