"""The reasoning in the answer of a thinking model, and the answer after it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

# The marks of most families, with names such as seed:think; then those of Magistral, of Cohere's Command models, and of
# Gemma 4.
OPENING = r"(?:<(?:\w+:)?think(?:ing)?>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought\n?)"
OPENING_AT_START = re.compile(rf"\s*{OPENING}")
OPENING_AT_END = re.compile(rf"{OPENING}\s*\Z")
CLOSING = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>")
# gpt-oss writes an answer as several messages, each in a channel: its thoughts in "analysis", its answer in others.
CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")
CHANNEL_HEADER = re.compile(r"(?:<\|start\|>[^<]*)?<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
CHANNEL_AT_START = re.compile(r"\s*(?:<\|start\|>[^<]*)?<\|channel\|>")
MESSAGE_END = re.compile(r"<\|(?:end|call|return|start)\|>")
THOUGHT_CHANNEL = "analysis"
GEMMA_CHANNEL = "<|channel>"  # followed by "thought"


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
    if CHANNEL_AT_START.match(text):
        return _split_channels(text)
    opening = OPENING_AT_START.match(text)
    rest = text[opening.end() :] if opening else text
    if opening or opened is not False:
        if closing := CLOSING.search(rest):
            return AnswerParts(rest[: closing.start()], rest[closing.end() :])
        if opening or opened:
            return AnswerParts(rest, "", unfinished=True)
    return AnswerParts("", text)


def _split_channels(text: str) -> AnswerParts:
    headers = list(CHANNEL_HEADER.finditer(text))
    bounds = [*(header.start() for header in headers), len(text)]
    parts: dict[bool, list[str]] = {True: [], False: []}
    for header, end in zip(headers, bounds[1:], strict=True):
        message = MESSAGE_END.split(text[header.end() : end], maxsplit=1)[0]
        parts[header[1] == THOUGHT_CHANNEL].append(message)
    reasoning, answer = ("\n\n".join(messages) for messages in (parts[True], parts[False]))
    return AnswerParts(reasoning, answer, unfinished=not parts[False])


def content_of(text: str) -> dict[str, str]:
    """The content of a message with this answer, and its reasoning beside it if it is written in channels (gpt-oss,
    Gemma 4), which templates do not accept within a content. Other marks stay where they are."""
    if not (CHANNEL_AT_START.match(text) or text.lstrip().startswith(GEMMA_CHANNEL)):
        return {"content": text}
    parts = split_reasoning(text)
    return {"content": parts.answer} | ({"reasoning_content": parts.reasoning} if parts.reasoning else {})


def without_reasoning(text: str) -> str:
    """An answer from the data, without the reasoning that may be written before it. A mark that is never closed is
    ordinary text there."""
    parts = split_reasoning(text, opened=False)
    return text if parts.unfinished or parts.answer == text else parts.answer.strip("\n")


def is_mark(text: str) -> bool:
    """Whether a text is nothing but a mark that opens or closes reasoning."""
    return bool(OPENING_AT_START.fullmatch(text) or CLOSING.fullmatch(text))


def reasoning_marks(tokens: Collection[str]) -> set[str]:
    """Those of a tokenizer's tokens without which reasoning could not be told from the answer."""
    marks = {token for token in tokens if is_mark(token) or token == GEMMA_CHANNEL}
    return marks | (set(CHANNEL_TOKENS).intersection(tokens) if "<|channel|>" in tokens else set())


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends with an opening mark, as for models that always think."""
    return bool(OPENING_AT_END.search(prompt))
