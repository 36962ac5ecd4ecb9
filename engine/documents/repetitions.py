"""Rows of a draft that are nearly the same as earlier ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from engine.core.rundir import read_object, write_json
from engine.data.dataset_info import dataset_of
from engine.data.near_duplicates import near_duplicates
from engine.documents.drafts import Draft

REPETITIONS_FILE = "duplicates.json"
Repetition = tuple[str, float]  # the id of the earlier row, and how similar they are, from 0 to 1


def write_repetitions(draft: Draft) -> None:
    """Compare all rows with the earlier ones, in the order of their passages, and write which are repetitions."""
    records = draft.records()
    rows = [row for number in sorted(records) for row in records[number]["rows"]]
    with tempfile.TemporaryDirectory(dir=draft.path, prefix=".rows-") as folder:
        lines = (json.dumps({"prompt": row["question"], "response": row["answer"]}, ensure_ascii=False) for row in rows)
        Path(folder, "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        columns = {"prompt": "prompt", "response": "response"}
        dataset = dataset_of(Path(folder), "rows", {"file_name": "rows.jsonl", "columns": columns})
        near = near_duplicates(dataset, draft.settings.similarity) if rows else {}
    repetitions = {
        rows[number]["id"]: (rows[pair.earlier.row - 1]["id"], round(pair.similarity, 3))
        for number, pair in near.items()
    }
    write_json(draft.path / REPETITIONS_FILE, repetitions)


def read_repetitions(draft: Draft) -> dict[str, Repetition]:
    """The rows that are repetitions, by their ids, as far as they have been compared."""
    pairs = read_object(draft.path / REPETITIONS_FILE)
    return {id: (str(pair[0]), float(pair[1])) for id, pair in pairs.items()}
