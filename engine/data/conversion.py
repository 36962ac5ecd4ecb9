"""Rows of any known format → one canonical form.

The meaning of a turn is left to `engine.data.messages`, that of its marks to `engine.data.loss_marks`. The order of
speakers is left to the model's chat template: what it renders is trained on as it is.

    text    {"text": str, "weights"?: [float]}
    chat    {"messages": [message, ...], "tools": [...] | None, "weights"?: [float for each answer]}; a message of the
            user may have `images`, and IMAGE_MARK in its content for each (`engine.data.row_images`)
    pairs   {"messages": prompt, "chosen": [message, ...], "rejected": [message, ...], "tools": ...}
    thumbs  {"messages": prompt and answer, "label": bool, "tools": ...}
    prompts {"messages": prompt, "answer": str | None, "tools": ...}; any of the three above, read for its questions

`weights` is present if not all are 1, and `notes` (Problems of a row that can still be used) if there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from engine.core.stages import Form
from engine.data import loss_marks
from engine.data.labels import label_of
from engine.data.messages import Message, as_conversation, conversation, text_of, tools
from engine.data.row_formats import MEDIA
from engine.data.row_images import IMAGE_COLUMNS, attach_images
from engine.data.row_values import Row, comma_separated, nth_element

Example = dict[str, Any]
Remark = tuple[str, dict[str, Any]]  # a code and its values
# Columns with videos or audio, and placeholders for them in a text.
REFUSED_MEDIA = tuple(name for name in MEDIA if name != "images")
MEDIA_COLUMNS = {column: f"<{column.rstrip('s')}>" for name in REFUSED_MEDIA for column in (name, name.rstrip("s"))}
SCORE_COLUMN_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)


def convert(row: Row, form: Form) -> Example:
    """A row in canonical form. Raises Refusal if something is wrong with it."""
    example = CONVERSIONS[form](row)
    if row.dataset.media or not MEDIA_COLUMNS.keys().isdisjoint(row.values):
        _refuse_media(row)
    if row.pictured or row.dataset.media or not row.values.keys().isdisjoint(IMAGE_COLUMNS):
        attach_images(row, example, form)
    if row.notes:
        example["notes"] = row.notes
    return example


def _text(row: Row) -> Example:
    column = "text" if row.place.file.suffix == ".txt" else row.column("prompt")
    if column not in row.values:
        raise row.bad("row-without-column", column=column, columns=comma_separated(row.values))
    example: Example = {"text": _nonempty_text(row, row.values[column], column)}
    if not loss_marks.ROW_MARK_COLUMNS.isdisjoint(row.values) and (weight := loss_marks.row_weight(row)) != 1:
        example["weights"] = [weight]
    return example


def _chat(row: Row) -> Example:
    messages = _with_valid_order(row, _conversation(row))
    weights = loss_marks.collect_weights(row, messages)
    example = {"messages": messages, "tools": tools(row)}
    return example if weights is None else example | {"weights": weights}


def _labelled_answer(row: Row) -> Example:
    value = row.need("kto_tag")
    label = label_of(value)
    if label is None:
        raise row.wrong_type(row.column("kto_tag"), "true/false", value, named=True)
    messages = _ending_with(row, _with_valid_order(row, _conversation(row)), "assistant")
    _note_unused_weights(row, loss_marks.collect_weights(row, messages))
    return {"messages": messages, "tools": tools(row), "label": label}


def _pairs(row: Row) -> Example:
    prompt, chosen, rejected = _preference_pair(row)
    for side in (chosen, rejected):
        _note_unused_weights(row, loss_marks.collect_weights(row, side))
    _note_unused_weights(row, loss_marks.collect_weights(row, prompt))
    _ending_with(row, prompt, "user", "tool")
    for side in (chosen, rejected):
        _with_valid_order(row, [*prompt, *side])
    if chosen == rejected:
        raise row.bad("row-pair-equal")
    if len(chosen) > 1 or len(rejected) > 1:
        row.note("row-pair-turns", chosen=len(chosen), rejected=len(rejected))
    _note_score_conflict(row)
    return {"messages": prompt, "chosen": chosen, "rejected": rejected, "tools": tools(row)}


def _prompts(row: Row) -> Example:
    """The questions of a row, and its answer if it has one: what follows the last turn of anyone else."""
    answers: list[str] = []
    if row.dataset.kind == "pairs":
        messages = _preference_pair(row)[0]
    else:
        messages = _prompt_messages(row)
        if row.dataset.formatting == "alpaca" and (value := row.get("response")):
            spoken = _as_messages(row, value, row.column("response"))
            answers = [spoken[-1]["content"] if spoken else text_of(row, value, row.column("response"))]
        while messages and messages[-1]["role"] == "assistant":
            answers.insert(0, messages.pop()["content"])
        if answers and not messages:
            raise row.bad("row-answers-only", count=len(answers))
        answers = [answer for answer in answers if answer]
        if len(answers) > 1:
            row.note("row-answers-joined", count=len(answers))
    loss_marks.collect_weights(row, messages)
    _with_valid_order(row, _ending_with(row, messages, "user", "tool"), answered=False)
    return {"messages": messages, "answer": "\n\n".join(answers) or None, "tools": tools(row)}


CONVERSIONS: Mapping[Form, Callable[[Row], Example]] = {
    "text": _text,
    "chat": _chat,
    "pairs": _pairs,
    "thumbs": _labelled_answer,
    "prompts": _prompts,
}


# --------------------------------------------------------------------------------------- its messages


def _nonempty_text(row: Row, value: Any, column: str) -> str:
    text = value if type(value) is str else text_of(row, value, column)
    if not text or text.isspace():
        raise row.bad("row-empty", column=column)
    return text


def _conversation(row: Row) -> list[Message]:
    """All messages of a row, including its answer."""
    messages = _prompt_messages(row)
    if row.dataset.formatting != "alpaca":
        return messages
    if not isinstance(row.get("prompt"), str):
        for message in messages:  # of a prompt and its completion, only the completion is trained on, as in TRL
            if message["role"] == "assistant" and "weight" not in message:
                loss_marks.set_weight(row, message, 0.0, row.column("prompt"))
    value, column = row.need("response"), row.column("response")
    spoken = _as_messages(row, value, column) or [{"role": "assistant", "content": _nonempty_text(row, value, column)}]
    return [*messages, *spoken]


def _as_messages(row: Row, value: Any, column: str) -> list[Message] | None:
    """The messages of a value that is not plain text; None if it is."""
    if isinstance(value, str) and not value.startswith("["):
        return None
    return as_conversation(row, value, column)


def _prompt_messages(row: Row) -> list[Message]:
    """All messages of a row that are not in a column of their own."""
    system = row.get("system")
    messages = [{"role": "system", "content": text_of(row, system, row.column("system"))}] if system else []
    if row.dataset.formatting != "alpaca":
        whole = conversation(row, row.need("messages"), row.column("messages"))
        return whole if whole and whole[0]["role"] == "system" else messages + whole
    if history := row.get("history"):
        messages += _history_messages(row, history)
    prompt, query, column = row.need("prompt"), row.get("query") or "", row.column("prompt")
    if spoken := _as_messages(row, prompt, column):
        return spoken if spoken[0]["role"] == "system" else messages + spoken
    question = prompt if type(prompt) is str else text_of(row, prompt, column)
    if query:
        query = query if type(query) is str else text_of(row, query, row.column("query"))
        question = f"{question}\n{query}" if question and query else question or query
    if not question or question.isspace():
        raise row.bad("row-empty", column=column)
    messages.append({"role": "user", "content": question})
    return messages


def _history_messages(row: Row, history: Any) -> list[Message]:
    messages: list[Message] = []
    for number, exchange in enumerate(row.items(history, row.column("history"))):
        column = nth_element(row.column("history"), number)
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise row.wrong_type(column, "[question, answer]", exchange)
        question, answer = (_nonempty_text(row, text, column) for text in exchange)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _with_valid_order(row: Row, messages: list[Message], *, answered: bool = True) -> list[Message]:
    """The messages, if their order is plausible; unusual orders are noted. `answered`: their answers are learned."""
    wrong, notes = _check_roles(tuple([message["role"] for message in messages]), answered)
    if wrong:
        code, values = wrong
        raise row.bad(code, **values)
    for code, values in notes:
        row.note(code, **values)
    return messages


@lru_cache(maxsize=4096)
def _check_roles(roles: tuple[str, ...], answered: bool) -> tuple[Remark | None, tuple[Remark, ...]]:
    """Problems of an order of speakers, and what is unusual about it."""
    notes: list[Remark] = []
    first = next((role for role in roles if role != "system"), "")
    if answered:
        if "assistant" not in roles:
            return ("row-without-answer", {}), ()
        if set(roles) == {"assistant"}:
            return ("row-answers-only", {"count": len(roles)}), ()
        if roles[-1] != "assistant":
            if first == "assistant":
                return ("row-speakers-swapped", {"role": roles[-1]}), ()
            notes.append(("row-open-question", {"role": roles[-1]}))
    if "tool" in roles and "assistant" not in roles[: (result := roles.index("tool"))]:
        return ("row-result-without-call", {"number": result + 1}), ()
    if first == "assistant":
        notes.append(("row-answer-first", {}))
    again = next((at for at, (role, next_role) in enumerate(pairwise(roles)) if role == next_role != "tool"), None)
    if again is not None:
        notes.append(("row-same-speaker", {"number": again + 2, "role": roles[again]}))
    return None, tuple(notes)


def _ending_with(row: Row, messages: list[Message], *last: str) -> list[Message]:
    """The messages, if the last one is from one of `last`."""
    if not messages:
        raise row.bad("row-without-messages")
    if (role := messages[-1]["role"]) not in last:
        raise row.bad("row-last", expected=comma_separated(last), found=role)
    return messages


# ------------------------------------------------------------------------------------------ two answers


def _preference_pair(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt and what follows it on either side. An answer can be a text, a message, several messages, or the whole
    conversation; in the last case the prompt is what both begin with, after the row's own prompt if that is not
    included."""
    chosen, rejected = (_answer_messages(row, role) for role in ("chosen", "rejected"))
    whole = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    column = row.column("messages" if row.dataset.formatting != "alpaca" else "prompt")
    prompt = _prompt_messages(row) if not whole or row.values.get(column) not in (None, "", []) else []
    shared = _common_prefix_length(chosen, rejected)
    if shared == len(chosen) == len(rejected):
        raise row.bad("row-pair-equal")
    for side, role in ((chosen, "chosen"), (rejected, "rejected")):
        if shared == len(side) or side[shared]["role"] != "assistant" or side[-1]["role"] != "assistant":
            raise row.bad("row-pair-shape", column=row.column(role))
    return _join_prompt(prompt, chosen[:shared]), chosen[shared:], rejected[shared:]


def _answer_messages(row: Row, role: str) -> list[Message]:
    value, column = row.need(role), row.column(role)
    return _as_messages(row, value, column) or [{"role": "assistant", "content": _nonempty_text(row, value, column)}]


def _common_prefix_length(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages that both begin with; where they differ, each has to begin an answer."""
    shared = 0
    for ours, other in zip(chosen, rejected, strict=False):
        if ours != other:
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        return shared
    while shared and (shared >= min(len(chosen), len(rejected)) or chosen[shared - 1]["role"] == "assistant"):
        shared -= 1
    return shared


def _join_prompt(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """A prompt, and what both answers begin with, which often repeats that prompt."""
    if not prompt or not shared:
        return prompt or shared
    system = [message for message in prompt if message["role"] == "system"]
    plain = prompt[len(system) :] if prompt[: len(system)] == system else prompt
    body = shared[1:] if shared[0]["role"] == "system" else shared
    if body[: len(plain)] == plain or body[-len(plain) :] == plain:
        return shared if shared[0]["role"] == "system" else [*system, *shared]
    return [*prompt, *shared]


def _note_score_conflict(row: Row) -> None:
    """Note that the rejected answer has the higher score."""
    for better, worse in SCORE_COLUMN_PAIRS:
        chosen, rejected = row.values.get(better), row.values.get(worse)
        if isinstance(chosen, (int, float)) and isinstance(rejected, (int, float)) and chosen < rejected:
            row.note("row-scores-disagree", chosen=chosen, rejected=rejected)


def _note_unused_weights(row: Row, weights: list[float] | None) -> None:
    """Marks of turns have no meaning in stages that compare or rate whole answers."""
    if weights is not None:
        row.note("row-marks-unused")


def _refuse_media(row: Row) -> None:
    """Raises Refusal if the row has a video or audio, recognized by its column or by a placeholder in the text."""
    refused = [name for name in row.dataset.media if name in REFUSED_MEDIA]
    mapped = {row.dataset.columns[name]: f"<{name.rstrip('s')}>" for name in refused}
    for column, placeholder in (MEDIA_COLUMNS | mapped).items():
        value = row.values.get(column)
        if not value or (column in row.dataset.used and column not in mapped):
            continue
        plain = isinstance(value, (str, int, float)) and column not in mapped
        if not plain or placeholder in str(row.values):
            raise row.bad("row-media", column=column, found=placeholder)
