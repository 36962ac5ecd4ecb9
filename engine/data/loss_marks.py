"""What a row says of what is to be trained in it: marks of a message, a mask of the messages, a weight of the whole row.

A mark is a number from 0 on or true/false: `weight` (OpenAI), `train` (axolotl), `loss` and `loss_scale` (ms-swift),
`loss_weight`. Several marks of one message multiply, and so does the row's own weight. They become one number for each
answer of the row; what they do in the loss is said in `engine.worker.data.turn_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.labels import weight_of
from engine.data.row_formats import COLUMN_ROLES, COLUMNS
from engine.data.row_values import Row, nth

Message = dict[str, Any]
TURN_MARKS = frozenset(("weight", "train", "training", "loss", "loss_weight", "loss_scale", "train_detail"))
ROW_WEIGHTS = ("loss_weight", "sample_weight", "loss_scale")  # columns that can mean nothing else
MASK = "loss_mask"
UNCLEAR = "weight"  # a column that may as well be of what the row is about
ROW_MARKS = frozenset((*ROW_WEIGHTS, MASK, UNCLEAR))
# Columns of a row that is nothing but a conversation.
CONVERSATION = frozenset(
    (*COLUMN_ROLES, *(name for names in COLUMNS.values() for name in names.values()), *ROW_MARKS,
     "functions", "completion", "text", "label", "id")
)  # fmt: skip


def turn_weight(row: Row, turn: Message, column: str) -> float | None:
    """What the marks of a turn come to; None if it has none. Raises Refusal at one that is no weight."""
    weight: float | None = None
    for key in sorted(TURN_MARKS.intersection(turn)):
        value = turn[key]
        if value is None:
            continue
        if key == "train_detail":
            value = _whole(row, value, column)
            if value is None:
                continue
        weight = _number(row, value, f"{column}.{key}") * (1.0 if weight is None else weight)
    return weight


def _whole(row: Row, detail: Any, column: str) -> Any:
    """What axolotl's marks of stretches of a text say, if all say the same; else a note, for an answer has one weight."""
    stretches = detail if isinstance(detail, list) else [detail]
    marks = [part.get("train") for part in stretches if isinstance(part, dict)]
    if len(marks) == len(stretches) and len(set(map(bool, marks))) == 1:
        return bool(marks[0])
    if stretches:
        row.note("row-mark-partial", column=f"{column}.train_detail")
    return None


def _number(row: Row, value: Any, column: str) -> float:
    weight = weight_of(value)
    if weight is None:
        raise row.bad("row-weight", column=column, found=str(value)[:40])
    return weight


def mark(row: Row, message: Message, weight: float | None, column: str) -> None:
    """Leave a weight at a message, until `weights` collects it. Only answers can be trained."""
    if weight is None:
        return
    if message["role"] != "assistant":
        if weight > 0:
            row.note("row-mark-elsewhere", column=column, role=message["role"])
        return
    message["weight"] = weight * message.get("weight", 1.0)
    row.marked = True


def mask_of(row: Row, roles: Sequence[str | None]) -> list[float | None] | None:
    """The row's mask, a weight for each of its turns, whose roles these are; a mask of the answers alone is one too.

    None if the row has no mask. Raises Refusal at one of another length, such as a mask of tokens.
    """
    value = row.parsed(row.values.get(MASK))
    if value is None or value == "":  # an empty cell
        return None
    if not isinstance(value, list):
        raise row.wrong_type(MASK, "list", value)
    mask = [
        None if entry is None else _number(row, entry, nth(MASK, number))
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
    """The weight of the row as a whole; 1 if it has none."""
    weight = 1.0
    mapped = row.dataset.columns.get("weight")
    for column in ROW_WEIGHTS if mapped is None else (mapped,):
        if (value := row.values.get(column)) is not None and value != "":
            weight *= _number(row, value, column)
    if mapped is None and (value := row.values.get(UNCLEAR)) is not None:
        strangers = [
            column for column in row.values if column not in CONVERSATION and column not in row.dataset.used
        ]
        number = weight_of(value)
        if number is not None and not strangers:
            return weight * number
        if number is not None:
            row.note("row-weight-unclear", column=UNCLEAR)
    return weight


def weights(row: Row, messages: Sequence[Message]) -> list[float] | None:
    """The weight of each answer, taken off the messages; None if all are 1."""
    whole = 1.0
    if "weight" in row.dataset.columns or not ROW_MARKS.isdisjoint(row.values):
        whole = row_weight(row)
    if not row.marked and whole == 1:
        return None
    each = [message.pop("weight", 1.0) * whole for message in messages if message["role"] == "assistant"]
    return each if any(weight != 1 for weight in each) else None
