"""A rendered conversation with its provenance, and what has to be inside or outside the span of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from engine.core.problems import Refusal, problem
from engine.worker.templates.chat_template import Row, Span, texts_in
from engine.worker.templates.provenance import Piece, Provenance


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation, where its text comes from, and what its template marks as generated."""

    row: Row
    text: str
    traced: Provenance
    marks: list[Span]
    separators: re.Pattern[str]

    def copies(self, number: int) -> list[Piece]:
        """The pieces of a message's content; the name of its author is in its header."""
        return [piece for piece in self.traced.pieces if piece.message == number and piece.field != "name"]

    def own(self, number: int) -> list[Piece]:
        """The pieces of a message, each part once: a template may repeat the name of a call at its result."""
        return list({piece.part: piece for piece in reversed(self.copies(number))}.values())[::-1]

    @cached_property
    def contexts(self) -> list[frozenset[str]]:
        """What precedes each message, as far as a generation prompt may depend on it: the speakers, their kinds of
        content, repetitions, and what the template looks for."""
        traits = []
        for message in self.row["messages"]:
            keys = [key for key, value in message.items() if value]
            traits.append({message["role"], *keys, *self.separators.findall(texts_in(message.get("content")))})
        again = accumulate(traits, lambda before, own: before | own | {f"{trait}, again" for trait in before & own})
        return [frozenset(), *map(frozenset, again)]

    def check_written(self, number: int, own: list[Piece]) -> None:
        """Raises Refusal if the template leaves out a call of this message, or its whole content."""
        missing = self.traced.missing
        fields = {piece.field for piece in own}
        # In a template that writes no names at all, a call is recognized by its arguments.
        nameless = "call" not in fields and "arguments" in fields
        lacks_call = (number, "call") in missing and not nameless
        if lacks_call or (number, "arguments") in missing:
            raise Refusal(problem("template-without-tool-calls", message=number + 1))
        if not own and any(owner == number for owner, _ in missing):
            raise Refusal(problem("answer-left-out", message=number + 1))

    def check_span(self, number: int, span: Span) -> None:
        """Raises Refusal if a call is not completely inside the span, or the content of the answer is also outside of
        it."""
        answer, (start, end) = self.text[slice(*span)], span
        own = self.copies(number)
        fields = {piece.field for piece in own}
        calls = self.row["messages"][number].get("tool_calls") or ()
        # In a template that writes no names at all, a call is recognized by its arguments, which are traced.
        nameless = "call" not in fields and "arguments" in fields
        for function in (call["function"] for call in calls if not nameless):
            words = _argument_words(function.get("arguments"), texts="arguments" not in fields)
            if not all(any(form in answer for form in _written_forms(word)) for word in (function["name"], *words)):
                raise Refusal(problem("template-without-tool-calls", message=number + 1))
        for piece in own:
            outside = piece.end > end or piece.start < start
            if outside and piece.start < piece.end and piece.field in ("content", "reasoning"):
                raise Refusal(problem("answer-written-twice", message=number + 1))

    def marked_start(self, least: int, first: int) -> int | None:
        """The start of the template's own mark around this answer, if that is not too early."""
        return next((begin for begin, end in self.marks if least <= begin <= first < end), None)


def _argument_words(value: Any, texts: bool) -> Iterator[str]:
    """What has to be found of the arguments of a call: their names, integers and, if requested, texts."""
    if isinstance(value, Mapping):
        yield from value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _argument_words(item, texts)
    if (isinstance(value, str) and texts) or type(value) is int:
        yield str(value)


def _written_forms(word: str) -> tuple[str, ...]:
    """A word as it is, and as written by JSON and Python."""
    word = word.strip()
    return word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1], repr(word)[1:-1]
