"""Which characters of a rendered conversation come from which message.

The conversation is rendered once more with marks around its texts: rare characters, different for each text. What is
left when they are removed again has to equal the first rendering, to the letter; then the marks changed nothing, and
what is between two of them is that text. If a template looks for something in a text (`'</think>' in content`), each
part between the matches gets its own marks, so that the template decides as before, and what it leaves out is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

from engine.data.template_losses import LOSSES
from engine.worker.templates.chat_template import (
    REASONING_KEYS,
    SYNTHETIC_CALL_ID,
    ChatTemplate,
    Message,
    Row,
    texts_in,
)

# The characters used as marks. Printable ones first, because a template that writes an object like Python escapes
# others.
MARK_RANGES = ((0x20000, 0x2A6DF), (0xF0000, 0xFFFFD))
FIELD_OF_KEY = {"content": "content", **dict.fromkeys(REASONING_KEYS, "reasoning"), "name": "name"}


class Piece(NamedTuple):
    """A part of a rendered conversation that was copied from one field of one message; in characters."""

    message: int
    field: str  # content, reasoning, call (the name of one), arguments, name (of the tool that answers a call)
    start: int
    end: int
    part: int = 0  # number of the text that it copies; a template may write a text twice


class Provenance(NamedTuple):
    """All pieces of a rendering in their order, and the fields of which a part was left out: (message, field).
    `is_changed`: some text was written with other letters."""

    pieces: list[Piece]
    missing: set[tuple[int, str]]
    is_changed: bool = False


# What is marked, and whether texts of only spaces are, too: less and less, because a template may react to marks.
ALL_FIELDS = frozenset({"content", "reasoning", "call", "arguments", "name"})
TRACE_ATTEMPTS = (
    (ALL_FIELDS, True),
    (ALL_FIELDS, False),
    (ALL_FIELDS - {"arguments", "name"}, False),
    ({"content", "reasoning"}, False),
)


def trace_provenance(
    template: ChatTemplate, row: Row, text: str, add_generation_prompt: bool = False
) -> Provenance | None:
    """Where `text`, the rendering of `row`, comes from; None if the template writes something else around marks."""
    for fields, blanks in TRACE_ATTEMPTS:
        marker = _Marker.of(template, row, fields, blanks)
        if marker is None:
            return None
        try:
            marked = template.render(marker.messages(row["messages"]), row.get("tools"), add_generation_prompt)
        except Exception:  # the template reacts to the marks
            continue
        if traced := marker.read(marked, text):
            return traced
    return None


def losses_in(row: Row, text: str, traced: Provenance) -> tuple[str, ...]:
    """What of `row` is not in `text`, as words of `engine.data.template_losses.LOSSES`."""
    messages = row["messages"]
    last = max([number for number, message in enumerate(messages) if message["role"] == "assistant"], default=-1)
    # Users may have a name, too; and the name of a result adds nothing if its call has been written.
    called = {call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    missing = [
        (n, field)
        for n, field in traced.missing
        if field != "name" or (messages[n]["role"] == "tool" and messages[n]["name"] not in called)
    ]
    lost = {_loss_kind(messages[number], field, number == last) for number, field in missing}
    if traced.is_changed:
        lost.add("changed")
    ids = [str(message["tool_call_id"]) for message in messages if message.get("tool_call_id")]
    if any(id not in text for id in ids if not SYNTHETIC_CALL_ID.fullmatch(id)):
        lost.add("tool_ids")
    return tuple(loss for loss in LOSSES if loss in lost)


def _loss_kind(message: Message, field: str, is_last: bool) -> str:
    role = message["role"]
    if field == "reasoning" or (role == "assistant" and field == "content" and "</think>" in message["content"]):
        return "reasoning" if is_last else "earlier_reasoning"
    if field == "content" and role == "assistant" and message.get("tool_calls"):
        return "text_beside_calls"
    if field == "content" and role == "system":
        return "system"
    return "tool_names" if field == "name" else "content"


class _Marker:
    """Marks the texts of a row, and reads the marks in its rendering."""

    def __init__(self, template: ChatTemplate, block: tuple[int, int], fields: Set[str], blanks: bool):
        self.first, last = block
        self.most = (last - self.first) // 2
        self.any_mark = re.compile(f"[{chr(self.first)}-{chr(last)}]")
        self.separators, self.fields, self.blanks = template.separators, fields, blanks
        self.owners: list[tuple[int, str]] = []
        self.texts: list[str] = []  # what is marked
        self.behind: list[str] = []  # the unmarked spaces at the end of each text

    @classmethod
    def of(cls, template: ChatTemplate, row: Row, fields: Set[str], blanks: bool) -> _Marker | None:
        written = texts_in(row["messages"])
        for block in MARK_RANGES:
            marker = cls(template, block, fields, blanks)
            if not marker.any_mark.search(written):
                return marker
        return None

    def messages(self, messages: list[Message]) -> list[Message]:
        return [self._message(number, message) for number, message in enumerate(messages)]

    def _message(self, number: int, message: Message) -> Message:
        # A blank text has to show where its message is only if nothing else does.
        blanks = self.blanks and not message.get("tool_calls") and not any(map(message.get, REASONING_KEYS))
        marked = {
            key: self._text(number, FIELD_OF_KEY[key], value, blanks) if key in FIELD_OF_KEY else value
            for key, value in message.items()
        }
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [{**call, "function": self._function(number, call["function"])} for call in calls]
        return marked

    def _function(self, number: int, function: Mapping[str, Any]) -> Mapping[str, Any]:
        name = self._text(number, "call", function["name"])
        return {**function, "name": name, "arguments": self._values(number, function.get("arguments"))}

    def _values(self, number: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(number, "arguments", value)
        if isinstance(value, Mapping):
            return {key: self._values(number, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(number, item) for item in value]
        return value

    def _text(self, number: int, field: str, text: Any, blanks: bool = False) -> Any:
        if not isinstance(text, str) or field not in self.fields:
            return text
        made, at = [], 0
        parts = list(_unseparated_parts(text, self.separators)) or ([(0, 0)] if blanks else [])
        for begin, end in parts:
            if len(self.owners) >= self.most:
                raise OverflowError("more parts than there are marks")
            mark = self.first + 2 * len(self.owners)
            self.owners.append((number, field))
            self.texts.append(text[begin:end])
            self.behind.append(text[end:] if not text[end:].strip() else "")
            made += [text[at:begin], chr(mark), text[begin:end], chr(mark + 1)]
            at = end
        return "".join([*made, text[at:]])

    def read(self, marked: str, text: str) -> Provenance | None:
        """None unless `marked` is `text` with complete pairs of marks."""
        pieces, plain, at, length, is_changed = [], [], 0, 0, False
        opened: tuple[int, int] | None = None
        for mark in self.any_mark.finditer(marked):
            plain.append(marked[at : mark.start()])
            length += mark.start() - at
            at = mark.end()
            owner, closes = divmod(ord(mark[0]) - self.first, 2)
            if bool(closes) != (opened is not None) or (opened and opened[0] != owner):
                return None
            if opened:
                spoken = self.owners[owner][1] in ("content", "reasoning")
                is_changed |= spoken and text[opened[1] : length] != self.texts[owner]
                pieces.append(self._with_spaces(owner, opened[1], length, text))
            opened = None if closes else (owner, length)
        plain.append(marked[at:])
        if opened or "".join(plain) != text:
            return None
        written = {ord(mark) - self.first for mark in self.any_mark.findall(marked)}
        missing = {owner for number, owner in enumerate(self.owners) if 2 * number not in written}
        # A blank text shows where its message is only if nothing else does.
        filled = {piece.message for piece in pieces if piece.start < piece.end}
        pieces = [piece for piece in pieces if piece.start < piece.end or piece.message not in filled]
        return Provenance(pieces, missing, is_changed)

    def _with_spaces(self, owner: int, start: int, end: int, text: str) -> Piece:
        """The piece with the following spaces that belong to its text, as far as the template has kept them."""
        behind = self.behind[owner]
        more = next((n for n, space in enumerate(behind) if text[end + n : end + n + 1] != space), len(behind))
        return Piece(*self.owners[owner], start, end + more, owner)


def _unseparated_parts(text: str, separators: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The parts of a text between separators, without spaces at their ends."""
    at = 0
    for begin, end in [*(match.span() for match in separators.finditer(text)), (len(text), len(text))]:
        part = text[at:begin]
        if stripped := part.strip():
            start = at + part.index(stripped[0])
            yield start, start + len(stripped)
        at = end
