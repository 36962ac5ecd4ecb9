"""Other ways to find the answers of a conversation, for templates that render marked texts differently from plain ones.

A template may measure a text or write it in another form, and then `engine.worker.templates.provenance` cannot follow
it. Here the answers are proposed by the template's own generation marks, by those of TRL's training template of the
same family, and by the difference of prefixes: what the conversation up to a message adds to the one before it. A
proposal is accepted only if each message's words are found where they belong, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from engine.data.images import IMAGE_MARK
from engine.worker.templates.chat_template import REASONING_KEYS, ChatTemplate, Message, Row, Span, render

TRAINING_SUFFIX = "_training.jinja"  # TRL's names for the variants of templates with generation marks


def proposed_spans(template: ChatTemplate, row: Row, text: str) -> Iterator[list[Span]]:
    """Where the answers may be: spans from the beginning of each to any place after its last word."""
    messages, tools = row["messages"], row.get("tools")
    yield template.generation_marks(messages, tools)
    if training := training_template(template.source):
        written, marks = render(template.tokenizer, training, messages, tools)
        yield marks if written == text else []
    yield _spans_by_prefixes(template, row, text)


def verified_answers(
    row: Row, text: str, spans: list[Span], control: re.Pattern[str]
) -> list[tuple[int, int, int]] | None:
    """For each answer, where it begins, where its last word ends, and where the words of the next message begin or the
    text ends; None if not every message is where it belongs.

    The texts between two answers have to be found between them, and the texts of an answer within it, in order; no word
    is searched for in a control token.
    """
    messages = row["messages"]
    if len(spans) != sum(message["role"] == "assistant" for message in messages):
        return None
    text = control.sub(lambda token: "\0" * len(token[0]), text)
    waiting = iter([*spans, (len(text), len(text))])
    at, (begin, end) = 0, next(waiting)
    words: list[Span] = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        place = _words_span(message, text, begin if is_answer else at, end if is_answer else begin)
        if place is None:
            return None
        words.append(place)
        at = place[1]
        if is_answer:
            begin, end = next(waiting)
    limits = [first for first, _ in words[1:]] + [len(text)]
    answers = [
        (last, limit)
        for message, (_, last), limit in zip(messages, words, limits, strict=True)
        if message["role"] == "assistant"
    ]
    return [(begin, last, limit) for (begin, _), (last, limit) in zip(spans, answers, strict=True)]


def _words_span(message: Message, text: str, begin: int, end: int) -> Span | None:
    """Where the words of a message begin and end in a part of the text; None if they are not all there."""
    calls = message.get("tool_calls") or ()
    words = [word for key in (*REASONING_KEYS, "content") for word in (message.get(key) or "").split(IMAGE_MARK)]
    words += [call["function"]["name"] for call in calls]
    first, last = None, begin
    for word in filter(None, ((word or "").strip() for word in words)):
        place = text.find(word, last, end)
        if place < 0:
            return None
        first, last = place if first is None else first, place + len(word)
    return (end if first is None else first), last


def _spans_by_prefixes(template: ChatTemplate, row: Row, text: str) -> list[Span]:
    spans: list[Span] = []
    for number, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            before = (
                template.render(row["messages"][:number], row.get("tools"), add_generation_prompt=True)
                if number
                else ""
            )
            if not text.startswith(before):
                return []
            spans.append((len(before), len(text)))
    limits = [begin for begin, _ in spans[1:]] + [len(text)]
    return [(begin, limit) for (begin, _), limit in zip(spans, limits, strict=True)]


def training_template(source: str) -> str | None:
    """TRL's training template for the family whose template is exactly `source`; None if there is none."""
    return _training_templates().get(source.strip())


@cache
def _training_templates() -> dict[str, str]:
    trl = find_spec("trl")  # located without importing it, which takes seconds
    places = (trl.submodule_search_locations if trl else None) or []
    folders = [Path(folder) / "chat_templates" for folder in places]
    templates = {}
    for folder in folders:
        for training in sorted(folder.glob(f"*{TRAINING_SUFFIX}")):
            plain = training.with_name(training.name.removesuffix(TRAINING_SUFFIX) + ".jinja")
            if plain.is_file():
                templates[plain.read_text(encoding="utf-8").strip()] = training.read_text(encoding="utf-8")
    return templates
