"""What a JSON object means as data: a row, a list of rows under some key, or columns. Pure; nothing is read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

SPEAKER_KEYS = ("role", "from", "speaker")  # what the turns of a conversation have
# Keys that identify an object as a row, so that a list of objects next to them is part of that row.
ROW_KEYS = frozenset((
    "instruction", "prompt", "question", "query", "problem", "input", "output", "response", "answer", "completion",
    "chosen", "rejected", "messages", "conversations", "text", "system", "指令", "问题", "回答", "答案", "输入", "输出",
))  # fmt: skip
ROW_LIST_KEYS = frozenset(("messages", "conversations", "history", "tools", "functions", "chosen", "rejected"))


@dataclass(frozen=True)
class Shape:
    """A key of ROW_ITERATORS, or "wrapped": a list of rows is under `key`, each in `inside` of its element if that is
    given.

    `code` and `values`: the problem, if the meaning is unclear.
    """

    name: str = ""
    key: str = ""
    inside: str = ""
    code: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def shape_of(value: Mapping[str, Any]) -> Shape:
    """The meaning of an object that is a whole file."""
    columns, data = value.get("columns"), value.get("data")
    if _is_string_list(columns) and isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        if all(len(row) == len(columns) for row in data):
            return Shape("split")
        return Shape(code="file-json-uneven", values={"columns": ", ".join(columns)})
    if value and all(isinstance(column, dict) for column in value.values()):
        return Shape(_shape_of_objects(value))
    lists = {key: column for key, column in value.items() if isinstance(column, list)}
    rows = [key for key, column in lists.items() if _is_row_list(column) and key not in ROW_LIST_KEYS]
    server = [key for key in rows if all(isinstance(element.get("row"), dict) for element in lists[key])]
    if len(server) == 1:
        return Shape("wrapped", server[0], "row")
    is_row = any(is_conversation(column) for column in lists.values()) or any(
        key in ROW_KEYS and isinstance(column, str) for key, column in value.items()
    )
    if is_row:
        return Shape("row")
    if len(rows) > 1:
        listing = ", ".join(f"{key} ({len(lists[key])})" for key in rows)
        return Shape(code="file-json-several-lists", values={"lists": listing})
    if rows:
        return Shape("wrapped", rows[0])
    return _shape_of_columns(value, lists)


def _shape_of_columns(value: Mapping[str, Any], lists: Mapping[str, list[Any]]) -> Shape:
    if not value or len(lists) < len(value):
        # {"data": [], "total": 0} is not a row of two columns, but has no rows.
        empty = [key for key, column in lists.items() if not column and key not in ROW_LIST_KEYS]
        return Shape("nothing" if empty and not set(value) & ROW_KEYS else "row")
    if len({len(column) for column in lists.values()}) > 1:
        listing = ", ".join(f"{key} ({len(column)})" for key, column in lists.items())
        return Shape(code="file-json-uneven", values={"columns": listing})
    return Shape("columns")


def _shape_of_objects(value: Mapping[str, Mapping[str, Any]]) -> str:
    """The meaning of an object of objects: by columns, by rows, or a single row."""
    inner = [key for column in value.values() for key in column]
    if any(isinstance(column.get(role), str) for column in value.values() for role in SPEAKER_KEYS[:2]):
        if set(value) & ROW_KEYS:  # {"prompt": {"role", "content"}, "chosen": {…}}
            return "row"
        return "index"
    if inner and all(map(_is_number, inner)) and not all(map(_is_number, value)):
        return "indexed columns"
    if all(map(_is_number, value)) or (set(inner) & ROW_KEYS and not set(value) & ROW_KEYS):
        return "index"
    return "indexed columns" if len(value) > 1 and _have_same_keys(value) and set(value) & ROW_KEYS else "row"


def _have_same_keys(value: Mapping[str, Mapping[str, Any]]) -> bool:
    first, *others = (list(column) for column in value.values())
    return bool(first) and all(other == first for other in others)


def _is_number(key: str) -> bool:
    return key.isdecimal()


def _is_string_list(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(element, str) for element in value)


def _is_row_list(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(element, dict) for element in value) and not is_conversation(value)


def is_conversation(value: list[Any]) -> bool:
    """Whether a list is a conversation: objects that each state their speaker."""
    return bool(value) and all(
        isinstance(turn, dict) and any(isinstance(turn.get(role), str) for role in SPEAKER_KEYS) for turn in value
    )


def is_closing(rest: str, inside: str) -> bool:
    """Whether this can follow the list of rows and close its object, without another list of rows."""
    text = rest.lstrip()
    try:
        value = json.loads("{" + (text[1:] if text.startswith(",") else text))
    except (ValueError, RecursionError):
        return False
    return bool(inside) or not any(isinstance(member, list) and _is_row_list(member) for member in value.values())


# ------------------------------------------------------------------------------------------------- rows


def _rows_of_columns(value: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for cells in zip(*value.values(), strict=True):
        yield dict(zip(value, cells, strict=True))


def _rows_of_indexed_columns(value: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for key in dict.fromkeys(key for column in value.values() for key in column):
        yield {name: column[key] for name, column in value.items() if key in column}


def _rows_of_split(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for cells in value["data"]:
        yield dict(zip(value["columns"], cells, strict=True))


ROW_ITERATORS: dict[str, Callable[[Mapping[str, Any]], Iterator[Any]]] = {
    "row": lambda value: iter([value]),
    "nothing": lambda value: iter(()),
    "columns": _rows_of_columns,
    "indexed columns": _rows_of_indexed_columns,
    "index": lambda value: iter(value.values()),
    "split": _rows_of_split,
}
