"""Changes dataset_info.json: adds, describes, renames and removes data sets, and leaves all else in it as it was.

A description says of a data file what its rows are and which column plays which part (`Mapping`); `propose` guesses
one from the first rows, for a person to correct. Reading the catalogue is left to `engine.datasets`.
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from engine import rowfiles
from engine.datasets import COLUMNS, INFO_FILE, TAGS, Dataset
from engine.problems import Refusal, problem
from engine.rundir import wait_for, write_text
from engine.stages import Kind

LOOKED_AT = 200  # first rows of a file that tell its columns
LONGEST_NAME = 100
# The parts that columns can play in rows of each kind; a set of them that is enough to say what a row is.
ROLES: dict[Kind, tuple[str, ...]] = {
    "text": ("prompt",),
    "chat": ("messages", "prompt", "query", "response", "history", "system", "tools"),
    "pairs": ("messages", "prompt", "query", "chosen", "rejected", "history", "system", "tools"),
    "thumbs": ("messages", "prompt", "query", "response", "kto_tag", "history", "system", "tools"),
}  # fmt: skip
ENOUGH: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt",),),
    "chat": (("messages",), ("prompt", "response")),
    "pairs": (("messages", "chosen", "rejected"), ("prompt", "chosen", "rejected")),
    "thumbs": (("messages", "kto_tag"), ("prompt", "response", "kto_tag")),
}
BESIDE_MESSAGES = ("messages", "system", "tools", "chosen", "rejected", "kto_tag")
# Names that people give to columns, the most telling first.
USUAL = {
    "prompt": ("instruction", "prompt", "question", "query", "ask", "problem", "user", "source", "指令", "问题", "提问", "题目"),
    "response": ("output", "response", "answer", "completion", "reply", "target", "assistant", "solution", "回答", "答案", "输出", "回复"),
    "query": ("input", "context", "输入", "上下文", "背景"),
    "system": ("system", "system_prompt", "系统提示"),
    "history": ("history", "历史"),
    "tools": ("tools", "functions", "工具"),
    "chosen": ("chosen", "preferred", "better", "较好", "优选"),
    "rejected": ("rejected", "dispreferred", "worse", "较差", "拒绝"),
    "kto_tag": ("kto_tag", "label", "thumb", "good", "liked", "标签", "好评"),
    "text": ("text", "content", "document", "body", "正文", "文本", "内容"),
}  # fmt: skip
ROLE_TAGS, CONTENT_TAGS = ("from", "role", "speaker"), ("value", "content", "text")


@dataclass(frozen=True)
class Mapping:
    """What the rows of a set are, and the column that plays each part."""

    kind: Kind
    columns: dict[str, str] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- what rows are


def first_rows(file: Path, encoding: str = "") -> list[dict[str, Any]]:
    """The first rows of a file that are rows."""
    found = (row for _, row in rowfiles.entries(file, encoding=encoding) if isinstance(row, dict))
    return list(islice(found, LOOKED_AT))


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Every column that occurs, in the order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def propose(rows: list[dict[str, Any]]) -> Mapping:
    """What the rows look like, going by the names of their columns and what is in them."""
    known = {column.casefold().strip(): column for column in columns_of(rows)}
    named = {
        role: next((known[name] for name in names if name in known), None) for role, names in USUAL.items()
    }
    found = {role: column for role, column in named.items() if column}
    columns = columns_of(rows)
    if turns := next((column for column in columns if _turns(rows, column)), None):
        found["messages"] = turns
    if "chosen" in found and "rejected" in found:
        return _mapping("pairs", found)
    if (
        "kto_tag" in found
        and _yes_or_no(rows, found["kto_tag"])
        and ("messages" in found or "response" in found)
    ):
        return _mapping("thumbs", found)
    if "messages" in found or {"prompt", "response"} <= set(found):
        return _mapping("chat", found)
    if "text" in found or len(columns) == 1:
        return Mapping("text", {"prompt": found.get("text") or columns[0]})
    if len(columns) == 2:  # two columns of any name: a question and its answer
        return Mapping("chat", dict(zip(("prompt", "response"), columns, strict=True)))
    return _mapping("chat", found)


def _mapping(kind: Kind, found: dict[str, str]) -> Mapping:
    beside = BESIDE_MESSAGES if "messages" in found else [role for role in ROLES[kind] if role != "messages"]
    return Mapping(kind, {role: found[role] for role in ROLES[kind] if role in beside and found.get(role)})


def _turns(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]] | None:
    """The turns of the first row that has some in this column."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return value if any(tag in value[0] for tag in ROLE_TAGS) else None
    return None


def _yes_or_no(rows: list[dict[str, Any]], column: str) -> bool:
    words = {str(row.get(column)).casefold() for row in rows}
    return bool(words) and words <= {"true", "false"}


def mapping_of(dataset: Dataset) -> Mapping:
    """The mapping that the entry of a data set has."""
    roles = ROLES[dataset.kind]
    return Mapping(dataset.kind, {role: column for role, column in dataset.columns.items() if role in roles})


def described(
    file_name: str, mapping: Mapping, rows: list[dict[str, Any]], before: Any = None
) -> dict[str, Any]:
    """The entry that says so, with everything else that the entry `before` had. Raises Refusal at what is missing."""
    chosen = {role: mapping.columns[role] for role in ROLES[mapping.kind] if mapping.columns.get(role)}
    columns = columns_of(rows)
    if unknown := [column for column in chosen.values() if columns and column not in columns]:
        raise Refusal(problem("mapping-unknown", column=unknown[0], columns=", ".join(columns)))
    if not any(set(enough) <= set(chosen) for enough in ENOUGH[mapping.kind]):
        parts = " / ".join(" + ".join(enough) for enough in ENOUGH[mapping.kind])
        raise Refusal(problem("mapping-incomplete", parts=parts, columns=", ".join(columns) or "—"))
    kept = {} if not isinstance(before, dict) else before
    drop = ("file_name", "formatting", "columns", "tags", "ranking")
    entry: dict[str, Any] = {"file_name": file_name} | {key: kept[key] for key in kept if key not in drop}
    if "messages" in chosen:
        chosen = {role: column for role, column in chosen.items() if role in BESIDE_MESSAGES}
        turns = _turns(rows, chosen["messages"]) or []
        entry["formatting"] = "sharegpt" if turns and "from" in turns[0] else "openai"
        if tags := _tags(turns, entry["formatting"]) or kept.get("tags"):
            entry["tags"] = tags
    if mapping.kind == "pairs":
        entry["ranking"] = True
    usual = COLUMNS["alpaca"]
    present = {role: usual[role] for role in ROLES["chat"] if usual.get(role) in columns}
    if mapping.kind != "chat" or "messages" in chosen or chosen != present:
        entry["columns"] = chosen
    return entry


def _tags(turns: list[dict[str, Any]], formatting: str) -> dict[str, str]:
    """How these turns name their parts, where that is not what the formatting is used to."""
    if not turns:
        return {}
    usual = TAGS[formatting]
    found = {
        "role_tag": next((tag for tag in ROLE_TAGS if tag in turns[0]), usual["role_tag"]),
        "content_tag": next((tag for tag in CONTENT_TAGS if tag in turns[0]), usual["content_tag"]),
    }
    named = set(usual.values())
    strangers = [
        str(turn.get(found["role_tag"])) for turn in turns if turn.get(found["role_tag"]) not in named
    ]
    if len(dict.fromkeys(strangers)) == 2:  # a conversation between two with names of their own
        found["user_tag"], found["assistant_tag"] = dict.fromkeys(strangers)
    return {tag: name for tag, name in found.items() if name != usual[tag]}


# ---------------------------------------------------------------------------------------------- the file


def add(data_dir: Path, name: str, entry: dict[str, Any]) -> str:
    """Put an entry under `name`, or the next such name that is free; returns the name."""
    with _changing(data_dir) as entries:
        free, number = name, 1
        while free in entries:
            number += 1
            free = f"{name}-{number}"
        entries[free] = entry
    return free


def save(data_dir: Path, name: str, entry: dict[str, Any], instead_of: str = "") -> str:
    """Put an entry under `name`, in the place of the one called `instead_of`; returns the name as it is kept.

    Raises Refusal if the name is none, or is another set's.
    """
    name = good_name(name)
    with _changing(data_dir) as entries:
        if name in entries and name != instead_of:
            raise Refusal(problem("set-name-taken", name=name))
        if instead_of in entries:
            renamed = {name if key == instead_of else key: value for key, value in entries.items()}
            entries.clear()
            entries.update(renamed)
        entries[name] = entry
    return name


def remove(data_dir: Path, name: str) -> None:
    """Take an entry out. Its files stay. Raises Refusal if there is none."""
    with _changing(data_dir) as entries:
        if name not in entries:
            raise Refusal(problem("set-unknown", name=name))
        del entries[name]


def entry_of(data_dir: Path, name: str) -> dict[str, Any]:
    """What the file says of a set. Raises Refusal if it says nothing, or is broken."""
    entry = _read(data_dir).get(name)
    if not isinstance(entry, dict):
        raise Refusal(problem("set-unknown", name=name))
    return entry


def derived(entry: dict[str, Any], dataset: Dataset, file_name: str) -> dict[str, Any]:
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


def good_name(given: str) -> str:
    """The name of a data set without the spaces around it. Raises Refusal if it cannot be one."""
    name = unicodedata.normalize("NFC", given).strip()
    if not name or len(name) > LONGEST_NAME or "," in name or not name.isprintable():
        raise Refusal(problem("set-name", name=name[:LONGEST_NAME] or "—", limit=LONGEST_NAME))
    return name


@contextlib.contextmanager
def _changing(data_dir: Path) -> Iterator[dict[str, Any]]:
    """The entries, to be changed by one at a time; written back as a whole or, after an error, not at all."""
    try:
        lock = wait_for(data_dir / f".{INFO_FILE}.lock")
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror)) from error
    try:
        entries = _read(data_dir)
        yield entries
        text = json.dumps(entries, ensure_ascii=False, indent=2) + "\n"
        write_text((data_dir / INFO_FILE).resolve(), text)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror)) from error
    finally:
        os.close(lock)


def _read(data_dir: Path) -> dict[str, Any]:
    """The file as it is; {} if there is none. Raises Refusal if it is broken, for then nothing may be written."""
    path = data_dir / INFO_FILE
    if not path.exists():
        return {}
    try:
        entries = json.loads(rowfiles.read_text(path))
    except (RecursionError, ValueError) as error:
        values = rowfiles.where_broken(error)
        raise Refusal(problem("catalogue-broken", file=str(path), **values)) from None
    if not isinstance(entries, dict):
        raise Refusal(problem("catalogue-not-object", file=str(path), found=rowfiles.type_of(entries)))
    return entries
