"""Guess what the columns of a file mean, by their names and contents, and check the guess against the first rows.

A guess is a `ColumnMapping`: for a person to correct on the Data tab (`propose`), or for a file that dataset_info.json
does not describe (`guess_entry`), where it has to be unambiguous.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from engine.core.stages import Kind
from engine.data import row_files
from engine.data.labels import label_of
from engine.data.row_formats import COLUMNS, CONTENT_TAGS, ROLE_TAGS, SPEAKERS, TAGS, messages_of_input

COLUMN_ROWS_SAMPLED = 200  # the first rows of a file, which determine its columns
MIN_LABEL_SHARE = 0.75  # minimum share of ratings among the values of a rating column
# The roles that columns can have in rows of each kind; any one of these sets is enough.
ROLES: dict[Kind, tuple[str, ...]] = {
    "text": ("prompt",),
    "chat": ("messages", "prompt", "query", "response", "history", "system", "tools"),
    "pairs": ("messages", "prompt", "query", "chosen", "rejected", "history", "system", "tools"),
    "thumbs": ("messages", "prompt", "query", "response", "kto_tag", "history", "system", "tools"),
}
SUFFICIENT_ROLES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt",),),
    "chat": (("messages",), ("prompt", "response")),
    "pairs": (("messages", "chosen", "rejected"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "thumbs": (("messages", "kto_tag"), ("prompt", "response", "kto_tag")),
}
BESIDE_MESSAGES = ("messages", "system", "tools", "chosen", "rejected", "kto_tag")
# Common names of columns, the most specific first.
USUAL_COLUMN_NAMES = {
    "prompt": (
        "instruction", "prompt", "question", "query", "ask", "problem", "user", "source",
        "指令", "问题", "提问", "题目",
    ),
    "response": (
        "output", "response", "answer", "completion", "reply", "target", "assistant", "solution",
        "回答", "答案", "输出", "回复",
    ),
    "query": ("input", "context", "输入", "上下文", "背景"),
    "system": ("system", "system_prompt", "系统提示"),
    "history": ("history", "历史"),
    "tools": ("tools", "functions", "工具"),
    "chosen": ("chosen", "preferred", "preferred_output", "better", "较好", "优选"),
    "rejected": ("rejected", "dispreferred", "non_preferred_output", "worse", "较差", "拒绝"),
    "kto_tag": ("kto_tag", "label", "thumb", "good", "liked", "标签", "好评"),
    "text": ("text", "content", "document", "body", "正文", "文本", "内容"),
}  # fmt: skip
NON_CONVERSATION_COLUMNS = (
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
    "prompt",
    "completion",
)  # columns whose turns are not the row's conversation


@dataclass(frozen=True)
class ColumnMapping:
    """The kind of the rows of a set, and the column for each role."""

    kind: Kind
    columns: dict[str, str] = field(default_factory=dict)


def first_rows(file: Path, encoding: str = "") -> list[dict[str, Any]]:
    """The valid rows among the first ones of a file."""
    rows = (row for _, row in row_files.entries(file, encoding=encoding) if isinstance(row, dict))
    return list(islice(rows, COLUMN_ROWS_SAMPLED))


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Every column that occurs, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def propose(rows: list[dict[str, Any]]) -> ColumnMapping:
    """The kind of the rows, judged by the names and contents of their columns."""
    if plain := _propose_by_names(rows):
        return plain
    columns = columns_of(rows)
    named = _columns_by_role(rows)
    if "text" in named or len(columns) == 1:
        return ColumnMapping("text", {"prompt": named.get("text") or columns[0]})
    if len(columns) == 2:  # two columns with any names: a question and its answer
        return ColumnMapping("chat", dict(zip(("prompt", "response"), columns, strict=True)))
    return _column_mapping("chat", named)


def _propose_by_names(rows: list[dict[str, Any]]) -> ColumnMapping | None:
    """The kind of the rows, if the names of their columns show it."""
    named = _columns_by_role(rows)
    columns = [column for column in columns_of(rows) if column.casefold() not in NON_CONVERSATION_COLUMNS]
    usual = [column for column in ("messages", "conversations") if column in columns]
    if turns := next((column for column in [*usual, *columns] if first_turns(rows, column)), None):
        named["messages"] = turns
    if "chosen" in named and "rejected" in named:
        if any(messages_of_input(row.get("input")) for row in rows):  # OpenAI's preference rows
            named = {role: column for role, column in named.items() if role != "query"} | {"prompt": "input"}
        return _column_mapping("pairs", named)
    labelled = "kto_tag" in named and _holds_labels(rows, named["kto_tag"])
    if labelled and ("messages" in named or {"prompt", "response"} <= set(named)):
        return _column_mapping("thumbs", named)
    if "messages" in named or {"prompt", "response"} <= set(named):
        return _column_mapping("chat", named)
    return None


def _columns_by_role(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Role → the column with a common name for it."""
    known = {column.casefold().strip(): column for column in columns_of(rows)}
    named = {
        role: next((known[name] for name in names if name in known), None) for role, names in USUAL_COLUMN_NAMES.items()
    }
    return {role: column for role, column in named.items() if column}


def label_columns(columns: Iterable[str]) -> list[str]:
    """Those of the columns that have a common name of a rating column."""
    return [column for column in columns if column.casefold().strip() in USUAL_COLUMN_NAMES["kto_tag"]]


def _column_mapping(kind: Kind, named: dict[str, str]) -> ColumnMapping:
    beside = BESIDE_MESSAGES if "messages" in named else [role for role in ROLES[kind] if role != "messages"]
    return ColumnMapping(kind, {role: named[role] for role in ROLES[kind] if role in beside and named.get(role)})


def first_turns(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]] | None:
    """The turns of the first row that has some in this column."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
        if isinstance(value, list) and value and all(isinstance(turn, str) and turn[:1] == "{" for turn in value):
            with contextlib.suppress(json.JSONDecodeError):
                value = [json.loads(turn) for turn in value]
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return value if any(tag in value[0] for tag in ROLE_TAGS) else None
    return None


def _holds_labels(rows: list[dict[str, Any]], column: str) -> bool:
    """Whether a column rates most rows as good or bad. Rows with other values are then bad rows. In columns of classes,
    even of three such as 0, 1 and 2, too many values are neither."""
    values = [row[column] for row in rows if row.get(column) not in (None, "")]
    labels = sum(label_of(value) is not None for value in values)
    return labels > len(rows) / 2 and labels >= MIN_LABEL_SHARE * len(values)


def dataset_info_entry(mapping: ColumnMapping, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What to write into dataset_info.json for such rows: formatting, columns, tags, ranking."""
    chosen = {role: mapping.columns[role] for role in ROLES[mapping.kind] if mapping.columns.get(role)}
    entry: dict[str, Any] = {}
    if "messages" in chosen:
        chosen = {role: column for role, column in chosen.items() if role in BESIDE_MESSAGES}
        turns = first_turns(rows, chosen["messages"]) or []
        entry["formatting"] = "sharegpt" if turns and "from" in turns[0] else "openai"
        if tags := _unusual_tags(turns, entry["formatting"]):
            entry["tags"] = tags
    if mapping.kind == "pairs":
        entry["ranking"] = True
    usual, columns = COLUMNS["alpaca"], columns_of(rows)
    present = {role: usual[role] for role in ROLES["chat"] if usual.get(role) in columns}
    if mapping.kind != "chat" or "messages" in chosen or chosen != present:
        entry["columns"] = chosen
    return entry


def _unusual_tags(turns: list[dict[str, Any]], formatting: str) -> dict[str, str]:
    """The names of the parts of these turns, as far as they differ from the defaults of the formatting."""
    if not turns:
        return {}
    usual = TAGS[formatting]
    tags = {
        "role_tag": next((tag for tag in ROLE_TAGS if tag in turns[0]), usual["role_tag"]),
        "content_tag": next((tag for tag in CONTENT_TAGS if tag in turns[0]), usual["content_tag"]),
    }
    known = {*usual.values(), *SPEAKERS}
    speakers = [str(turn.get(tags["role_tag"])) for turn in turns]
    strangers = dict.fromkeys(speaker for speaker in speakers if speaker.casefold() not in known)
    if len(strangers) == 2:  # a conversation between two custom names
        tags["user_tag"], tags["assistant_tag"] = strangers
    return {tag: name for tag, name in tags.items() if name != usual[tag]}


# --------------------------------------------------------------------------------- without a description


def guess_entry(file: Path, encoding: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset_info.json entry for a file's rows, {} if they have the default format; and, if some of the first rows
    do not fit, how many: `kind`, `unlike`, `rows`."""
    entry, unlike = _guess_entry(file, encoding, *row_files.version(file))
    return dict(entry), dict(unlike)


@lru_cache(maxsize=1024)
def _guess_entry(file: Path, encoding: str, _mtime_ns: int, _size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = first_rows(file, encoding)
    if not rows:
        return {}, {}
    mapping = _propose_by_names(rows)
    if mapping is None:
        named = _columns_by_role(rows)
        if "text" not in named or {"prompt", "response"} & set(named):
            return {}, {}
        mapping = ColumnMapping("text", {"prompt": named["text"]})
    needed = next(
        (enough for enough in SUFFICIENT_ROLES[mapping.kind] if set(enough) <= set(mapping.columns)),
        tuple(mapping.columns),
    )
    unlike = sum(any(row.get(mapping.columns[role]) is None for role in needed) for row in rows)
    entry = dataset_info_entry(mapping, rows)
    if not entry:  # the default format
        return {}, {}
    if "messages" in mapping.columns:  # later rows may have what the first ones do not
        entry["columns"] = {"system": "system", "tools": "tools"} | entry["columns"]
    counts = {"kind": mapping.kind, "unlike": unlike, "rows": len(rows)}
    return entry, counts if unlike else {}
