"""The reasoning in the answer of a thinking model, and the answer after it."""

from __future__ import annotations

import re
from typing import NamedTuple

# The marks of most families, with names such as seed:think; then those of Magistral and of Cohere's Command models.
OPENING = r"(?:<(?:\w+:)?think(?:ing)?>|\[THINK\]|<\|START_THINKING\|>)"
OPENING_AT_START = re.compile(rf"\s*{OPENING}")
OPENING_AT_END = re.compile(rf"{OPENING}\s*\Z")
CLOSING = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<\|END_THINKING\|>")


class AnswerParts(NamedTuple):
    """`unfinished`: the text ended within the reasoning, so that there is no answer."""

    reasoning: str
    answer: str
    unfinished: bool = False


def split_reasoning(text: str, *, opened: bool | None = None) -> AnswerParts:
    """The reasoning at the start of a text, without its marks, and the rest.

    `opened`: whether the prompt ended with the opening mark, so that the text has only the closing one. If it is not
    known (None), a closing mark without an opening one ends reasoning; if the prompt did not (False), it is ordinary
    text.
    """
    opening = OPENING_AT_START.match(text)
    rest = text[opening.end() :] if opening else text
    if opening or opened is not False:
        if closing := CLOSING.search(rest):
            return AnswerParts(rest[: closing.start()], rest[closing.end() :])
        if opening or opened:
            return AnswerParts(rest, "", unfinished=True)
    return AnswerParts("", text)


def without_reasoning(text: str) -> str:
    """An answer from the data, without the reasoning that may be written before it. A mark that is never closed is
    ordinary text there."""
    parts = split_reasoning(text, opened=False)
    return text if parts.unfinished or parts.answer == text else parts.answer.strip("\n")


def is_mark(text: str) -> bool:
    """Whether a text is nothing but a mark that opens or closes reasoning."""
    return bool(OPENING_AT_START.fullmatch(text) or CLOSING.fullmatch(text))


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends with an opening mark, as for models that always think."""
    return bool(OPENING_AT_END.search(prompt))
