"""The accepted rows of a draft as a data set, each with its source."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.data import dataset_info_edits, owners, uploads
from engine.data.columns import ColumnMapping
from engine.documents.drafts import Draft
from engine.documents.review import FILTERS, DraftRow


def _alpaca(row: DraftRow) -> dict[str, Any]:
    return {"instruction": row.question, "input": "", "output": row.answer}


def _messages(row: DraftRow) -> dict[str, Any]:
    turns = (("user", row.question), ("assistant", row.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FORMATS: dict[str, tuple[Callable[[DraftRow], dict[str, Any]], ColumnMapping]] = {
    "alpaca": (_alpaca, ColumnMapping("chat", {"prompt": "instruction", "query": "input", "response": "output"})),
    "messages": (_messages, ColumnMapping("chat", {"messages": "messages"})),
}


def save_accepted(draft: Draft, rows: Sequence[DraftRow], form: str, data_dir: Path, by: str) -> str:
    """Write the accepted rows to a new file of the data folder, and describe it under the draft's name or the next free
    variant of that, which is returned. It belongs to `by`. Raises Refusal if no row is accepted."""
    if form not in FORMATS:
        raise Refusal(problem("spec-choice", "form", given=form[:40], choices=", ".join(FORMATS)))
    accepted = [row for row in rows if FILTERS["accepted"](row)]
    if not accepted:
        raise Refusal(problem("draft-nothing-accepted", name=draft.name))
    write, mapping = FORMATS[form]
    records = [write(row) | {"source": row.passage.source} for row in accepted]
    name = dataset_info_edits.valid_name(draft.name)
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=uploads.ARRIVING) as folder:
            file = Path(folder) / f"{uploads.safe_name(name)}.jsonl"
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.write_text("".join(lines), encoding="utf-8")
            placed = str(uploads.place(file, data_dir).relative_to(data_dir))
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error
    saved = dataset_info_edits.add(data_dir, name, dataset_info_edits.entry_for_mapping(placed, mapping, records))
    owners.claim_sets(data_dir, [saved], by)
    return saved
