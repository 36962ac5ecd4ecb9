"""One turn of a conversation, in any common spelling → messages as chat templates expect them.

    {"role": "system" | "user" | "assistant" | "tool", "content": str, "reasoning_content"?: str, "tool_call_id"?: str,
     "name"?: str, "tool_calls"?: [{"id"?, "type": "function", "function": {"name", "arguments": object}}]}

It reads ShareGPT's and OpenAI's turns, with `tool_calls` or the older `function_call`; Gemini's `parts`; content as
text or as a list of parts: text, thoughts, Anthropic's tool_use and tool_result. An image leaves IMAGE_MARK in the text
and its reference in `images`, which `engine.data.row_images` resolves. Videos, audio and files are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data import loss_marks
from engine.data.images import IMAGE_MARK
from engine.data.loss_marks import TURN_MARK_KEYS, Message
from engine.data.row_formats import CALL_ROLE, CONTENT_TAGS, ROLE_TAGS, messages_of_input
from engine.data.row_images import PART_TYPES, part_reference
from engine.data.row_values import Row, comma_separated, nth_element

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PLAIN_ROLES = ("user", "assistant", "system")
IMAGE_KEYS = frozenset(("image", "image_url"))  # of a part without a type
# Types of parts, and keys of parts without a type, that are neither text nor an image.
MEDIA_WORDS = (
    "audio",
    "video",
    "file",
    "document",
    "inline_data",
    "inlineData",
    "fileData",
    "sound",
)


@dataclass(slots=True)
class Content:
    """What the parts of a content add up to."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)  # what its parts refer to, in order


def conversation(row: Row, value: Any, column: str) -> list[Message]:
    """The messages of a list of turns, with the weights from the turns and the row's mask."""
    turns = _parsed_objects(row, row.items(value, column))
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        messages += turn_messages(row, turn, column, number)
    if loss_marks.MASK_COLUMN in row.values:
        return _masked_messages(row, turns, column)
    return messages


def _parsed_objects(row: Row, items: list[Any]) -> list[Any]:
    """The items of a list; each may be the JSON of an object, since the datasets library stores irregular items so in
    Parquet."""
    if not any([type(item) is str for item in items]):
        return items
    return [row.parsed(item) for item in items]


def _masked_messages(row: Row, turns: Sequence[Any], column: str) -> list[Message]:
    each = [turn_messages(row, turn, column, number) for number, turn in enumerate(turns)]
    mask = loss_marks.row_mask(row, [messages[-1]["role"] for messages in each])
    for number, (messages, weight) in enumerate(zip(each, mask or (), strict=False)):
        loss_marks.set_weight(row, messages[-1], weight, nth_element(loss_marks.MASK_COLUMN, number))
    return [message for messages in each for message in messages]


def as_conversation(row: Row, value: Any, column: str) -> list[Message] | None:
    """The messages of a value that is a turn or a list of turns, the JSON of such a list, or OpenAI's `input` of a
    preference row; None if it is not."""
    if (inner := messages_of_input(value)) is not None:
        value, column = inner, f"{column}.messages"
    turns = [value] if isinstance(value, dict) else row.parsed(value)
    turns = _parsed_objects(row, turns) if isinstance(turns, list) else None
    if not turns or not isinstance(turns[0], dict):
        return None
    speaker = _first_key(turns[0], (row.dataset.tags["role_tag"], *ROLE_TAGS))
    if speaker is None or (isinstance(value, str) and row.dataset.role_of(turns[0][speaker]) is None):
        return None
    return conversation(row, turns, column)


def turn_messages(row: Row, turn: Any, column: str, number: int) -> list[Message]:
    """One turn; several messages if it contains tool results and other content."""
    dataset = row.dataset
    if isinstance(turn, dict) and len(turn) == 2:  # fast path for the usual ones
        content = turn.get(dataset.tags["content_tag"])
        role = dataset.role_of(turn.get(dataset.tags["role_tag"]))
        if type(content) is str and role in PLAIN_ROLES and (role == "system" or not content.isspace()) and content:
            return [{"role": role, "content": content}]
    return _full_turn(row, turn, nth_element(column, number))


def _full_turn(row: Row, turn: Any, column: str) -> list[Message]:
    if not isinstance(turn, dict):
        raise row.wrong_type(column, "object", turn)
    tags = row.dataset.tags
    role_tag = _first_key(turn, (tags["role_tag"], *ROLE_TAGS))
    if role_tag is None:
        raise row.bad("row-without-column", column=f"{column}.{tags['role_tag']}", columns=comma_separated(turn))
    role = row.dataset.role_of(turn[role_tag])
    if role is None:
        known = comma_separated(row.dataset.speakers)
        raise row.bad("row-role", column=f"{column}.{role_tag}", found=turn[role_tag], known=known)
    content_tag = _first_key(turn, (tags["content_tag"], *CONTENT_TAGS)) or tags["content_tag"]
    value, where = turn.get(content_tag), f"{column}.{content_tag}"
    if role == CALL_ROLE:
        message = {"role": "assistant", "content": "", "tool_calls": calls(row, value, where)}
        messages = [_with_ids(message, turn)]
    elif role == "tool":
        messages = [_with_ids({"role": "tool", "content": _tool_result(row, value, where)}, turn)]
    elif role == "assistant":
        messages = [_answer_message(row, turn, content_of(row, value, where), where)]
    else:
        messages = _question_messages(row, role, turn, content_of(row, value, where), where)
    if not TURN_MARK_KEYS.isdisjoint(turn):
        loss_marks.set_weight(row, messages[-1], loss_marks.turn_weight(row, turn, column), column)
    return messages


def _first_key(turn: Message, keys: Iterable[str]) -> str | None:
    return next((key for key in keys if key in turn), None)


def _with_ids(message: Message, turn: Message) -> Message:
    """The message with those names and ids of its turn that a template may render."""
    for key in ("tool_call_id", "name"):
        if isinstance(turn.get(key), str) and turn[key]:
            message[key] = turn[key]
    return message


def _question_messages(row: Row, role: str, turn: Message, content: Content, column: str) -> list[Message]:
    """What a user or the system says, after any tool results in the same turn."""
    if content.calls:
        raise row.bad("row-not-text", column=column, found="tool_use")
    # An empty system message is a way to turn off a template's own.
    if content.images and role != "user":
        raise row.bad("row-image-role", role=role)
    if not content.text.strip() and role == "user":
        if content.results:
            return content.results
        raise row.bad("row-empty", column=column)
    message = _with_ids({"role": role, "content": content.text}, turn)
    return [*content.results, {**message, "images": content.images} if content.images else message]


def _answer_message(row: Row, turn: Message, content: Content, column: str) -> Message:
    if content.images:
        raise row.bad("row-image-role", role="assistant")
    message: Message = {"role": "assistant", "content": content.text}
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    thought = content.reasoning if reasoning is None else content_of(row, reasoning, column).text
    if thought.strip():
        message["reasoning_content"] = thought
    made = [*calls(row, turn.get("tool_calls") or [], column), *content.calls]
    if turn.get("function_call"):
        made += calls(row, turn["function_call"], column)
    if made:
        message["tool_calls"] = made
    elif not content.text.strip() and "reasoning_content" not in message:
        if turn.get("content") is None and not content.text:
            raise row.wrong_type(column, "string", None)
        raise row.bad("row-empty", column=column)
    return _with_ids(message, turn)


def _tool_result(row: Row, value: Any, column: str) -> str:
    """The result of a tool, which may be empty, or data instead of text."""
    if isinstance(value, dict) or (isinstance(value, list) and not all(map(_is_part, value))):
        return json.dumps(row.structs(value), ensure_ascii=False, default=str)
    content = content_of(row, value, column)
    if content.images:
        raise row.bad("row-image-role", role="tool")
    return content.text


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and ("type" in value or "text" in value))


# -------------------------------------------------------------------------------------------- content


def text_of(row: Row, value: Any, column: str) -> str:
    """The text of a column that is a string or a list of text parts. Raises Refusal for anything else: strings in a
    list may be several answers."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and any(isinstance(part, str) for part in value):
        raise row.wrong_type(column, "string", value)
    content = content_of(row, value, column)
    if content.images:
        raise row.bad("row-media", column=column, found="image")
    if value is None or content.calls or content.results:
        raise row.wrong_type(column, "string", value)
    return content.text


def content_of(row: Row, value: Any, column: str) -> Content:
    """A content in any spelling. null means no content. Raises Refusal for anything that is not text."""
    if isinstance(value, str):
        return Content(value)
    content = Content()
    if value is None:
        return content
    if isinstance(value, dict) and _is_part(value):
        value = [value]
    if not isinstance(value, list):
        raise row.wrong_type(column, "string", value)
    for part in value:
        if isinstance(part, str):
            content.text += part
        elif isinstance(part, dict):
            _add_part(row, {key: inner for key, inner in part.items() if inner is not None}, content, column)
        elif part is not None:
            raise row.wrong_type(column, "string", value)
    return content


def _add_part(row: Row, part: dict[str, Any], content: Content, column: str) -> None:
    kind = part.get("type", "")
    if kind in ("text", "input_text", "output_text", "") and "text" in part:
        text = part["text"]
        content.text += text_of(row, text.get("value") if isinstance(text, dict) else text, column)
    elif kind == "refusal":
        content.text += text_of(row, part.get("refusal"), column)
    elif kind in ("thinking", "reasoning", "reasoning_text"):
        thought = next(
            (part[key] for key in ("thinking", "reasoning", "text", "content", "summary") if key in part), ""
        )
        content.reasoning += content_of(row, thought, column).text
    elif kind == "summary_text":
        content.text += text_of(row, part.get("text"), column)
    elif kind == "redacted_thinking":
        return
    elif kind in PART_TYPES or (not kind and not IMAGE_KEYS.isdisjoint(part)):
        content.text += IMAGE_MARK
        content.images.append(part_reference(part))
        row.pictured = True
    elif kind == "tool_use":
        call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
        content.calls += calls(row, call, column)
    elif kind == "tool_result":
        message: Message = {"role": "tool", "content": _tool_result(row, part.get("content"), column)}
        content.results.append(_with_ids(message, {"tool_call_id": part.get("tool_use_id")}))
    else:
        what = kind or comma_separated(part)
        media = any(word in what for word in MEDIA_WORDS)
        raise row.bad("row-media" if media else "row-not-text", column=column, found=what)


# ---------------------------------------------------------------------------------------------- calls


def calls(row: Row, value: Any, column: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's format, with the arguments as an object; from one call or several, or their JSON."""
    value = row.parsed(value)
    made = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.wrong_type(column, '{"name", "arguments"}', call)
        arguments = row.parsed(row.structs(function.get("arguments")))
        if isinstance(arguments, str) and not arguments.strip():
            arguments = None
        if arguments is not None and not isinstance(arguments, dict):
            raise row.wrong_type(f"{column}.arguments", "object", arguments)
        whole = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        identity = call.get("id")
        made.append({"id": identity, **whole} if isinstance(identity, str) and identity else whole)
    return made


def tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools of a row in OpenAI's format; if there are none, those of a preference row's `input`, or the older
    `functions`."""
    prompt = row.values.get(row.dataset.columns.get("prompt", ""))
    column = row.dataset.columns.get("tools")
    if isinstance(prompt, dict) and messages_of_input(prompt) and (value := prompt.get("tools")):
        column = f"{row.column('prompt')}.tools"
    elif not column:
        return None
    else:
        value = row.values.get(column)
    if not value:
        column, value = "functions", row.values.get("functions")
    if not value:
        return None
    items = row.structs(_parsed_objects(row, row.items(value, column)))
    if any(not isinstance(other := tool, dict) for tool in items):
        raise row.wrong_type(column, "[object]", other)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in items] or None
