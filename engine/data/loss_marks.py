"""What a row specifies about training on it: marks of messages, a mask over the messages, a weight of the whole row.

A mark is a number ≥ 0 or true/false: `weight` (OpenAI), `train` (axolotl), `loss` and `loss_scale` (ms-swift),
`loss_weight`. Several marks of one message multiply, and so does the row's own weight. They become one number for each
answer of the row; `engine.worker.data.turn_weights` describes their effect on the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.labels import weight_of
from engine.data.row_formats import COLUMN_ROLES, COLUMNS
from engine.data.row_values import Row, nth_element

Message = dict[str, Any]
TURN_MARK_KEYS = frozenset(("weight", "train", "training", "loss", "loss_weight", "loss_scale", "train_detail"))
ROW_WEIGHT_COLUMNS = ("loss_weight", "sample_weight", "loss_scale")  # columns that can only mean this
MASK_COLUMN = "loss_mask"
AMBIGUOUS_WEIGHT_COLUMN = "weight"  # a column that may also be part of the row's subject
ROW_MARK_COLUMNS = frozenset((*ROW_WEIGHT_COLUMNS, MASK_COLUMN, AMBIGUOUS_WEIGHT_COLUMN))
# Columns of a row that is nothing but a conversation.
CONVERSATION_COLUMNS = frozenset(
    (
        *COLUMN_ROLES,
        *(name for names in COLUMNS.values() for name in names.values()),
        *ROW_MARK_COLUMNS,
        "functions",
        "completion",
        "text",
        "label",
        "id",
    )
)


def turn_weight(row: Row, turn: Message, column: str) -> float | None:
    """The combined weight of a turn's marks; None if it has none. Raises Refusal for an invalid weight."""
    weight: float | None = None
    for key in sorted(TURN_MARK_KEYS.intersection(turn)):
        value = turn[key]
        if value is None:
            continue
        if key == "train_detail":
            value = _train_detail(row, value, column)
            if value is None:
                continue
        weight = _weight(row, value, f"{column}.{key}") * (1.0 if weight is None else weight)
    return weight


def _train_detail(row: Row, detail: Any, column: str) -> Any:
    """The mark of axolotl's spans of a text, if all have the same; otherwise a note, because an answer has one
    weight."""
    spans = detail if isinstance(detail, list) else [detail]
    marks = [part.get("train") for part in spans if isinstance(part, dict)]
    if len(marks) == len(spans) and len(set(map(bool, marks))) == 1:
        return bool(marks[0])
    if spans:
        row.note("row-mark-partial", column=f"{column}.train_detail")
    return None


def _weight(row: Row, value: Any, column: str) -> float:
    weight = weight_of(value)
    if weight is None:
        raise row.bad("row-weight", column=column, found=str(value)[:40])
    return weight


def set_weight(row: Row, message: Message, weight: float | None, column: str) -> None:
    """Store a weight at a message, until `collect_weights` takes it. Only answers can be trained on."""
    if weight is None:
        return
    if message["role"] != "assistant":
        if weight > 0:
            row.note("row-mark-elsewhere", column=column, role=message["role"])
        return
    message["weight"] = weight * message.get("weight", 1.0)
    row.marked = True


def row_mask(row: Row, roles: Sequence[str | None]) -> list[float | None] | None:
    """The row's mask, a weight for each turn with these roles; a mask of the answers alone is also accepted.

    None if the row has no mask. Raises Refusal if its length differs, as in a mask of tokens.
    """
    value = row.parsed(row.values.get(MASK_COLUMN))
    if value is None or value == "":  # an empty cell
        return None
    if not isinstance(value, list):
        raise row.wrong_type(MASK_COLUMN, "list", value)
    mask = [
        None if entry is None else _weight(row, entry, nth_element(MASK_COLUMN, number))
        for number, entry in enumerate(value)
    ]
    if len(mask) == len(roles):
        return mask
    answers = [at for at, role in enumerate(roles) if role == "assistant"]
    if len(mask) != len(answers):
        raise row.bad("row-mask-length", entries=len(mask), messages=len(roles), answers=len(answers))
    spread: list[float | None] = [None] * len(roles)
    for at, weight in zip(answers, mask, strict=True):
        spread[at] = weight
    return spread


def row_weight(row: Row) -> float:
    """The weight of the whole row; 1 if it has none."""
    weight = 1.0
    mapped = row.dataset.columns.get("weight")
    for column in ROW_WEIGHT_COLUMNS if mapped is None else (mapped,):
        if (value := row.values.get(column)) is not None and value != "":
            weight *= _weight(row, value, column)
    if mapped is None and (value := row.values.get(AMBIGUOUS_WEIGHT_COLUMN)) is not None:
        strangers = [
            column for column in row.values if column not in CONVERSATION_COLUMNS and column not in row.dataset.used
        ]
        number = weight_of(value)
        if number is not None and not strangers:
            return weight * number
        if number is not None:
            row.note("row-weight-unclear", column=AMBIGUOUS_WEIGHT_COLUMN)
    return weight


def collect_weights(row: Row, messages: Sequence[Message]) -> list[float] | None:
    """The weight of each answer, removed from the messages; None if all are 1."""
    whole = 1.0
    if "weight" in row.dataset.columns or not ROW_MARK_COLUMNS.isdisjoint(row.values):
        whole = row_weight(row)
    if not row.marked and whole == 1:
        return None
    each = [message.pop("weight", 1.0) * whole for message in messages if message["role"] == "assistant"]
    return each if any(weight != 1 for weight in each) else None
