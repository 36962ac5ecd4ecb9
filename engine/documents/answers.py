"""What a model's answer says, if it says it in a form that can be read: JSON, or lines that begin with Q: and A:.

Either is read whichever was asked for, since small models keep to neither. What cannot be read is left to the caller to
count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.core.reasoning import split_reasoning
from engine.evaluation.judge import after_labels

QUESTION_KEYS = ("question", "q", "instruction", "prompt", "问题", "问")
ANSWER_KEYS = ("answer", "a", "output", "response", "答案", "回答", "答")
PLACEHOLDERS = {"the question", "the answer", "question", "answer", "问题", "答案", "...", "…"}  # a form not filled in
REPEATED_FORM = re.compile(r"\A(?:the )?(?:question|answer)\s*:\s*", re.IGNORECASE)  # as small models begin
BEFORE_MARK = r"[\s>*#\-]*(?:\d+[.)、]\s*)?[\s*#]*"
QUESTION_LINE = re.compile(rf"{BEFORE_MARK}(?:questions?|q|问题|问)\s*\d*\s*\**\s*[:：]\s*\**\s*(.*)", re.IGNORECASE)
ANSWER_LINE = re.compile(rf"{BEFORE_MARK}(?:answers?|a|答案|回答|答)\s*\d*\s*\**\s*[:：]\s*\**\s*(.*)", re.IGNORECASE)
SCORE_LABEL = r"(?i:score|rating|评分|分数|得分)"
BARE_SCORE = re.compile(r"\A\W*(?P<choice>[1-5])(?:\s*/\s*5|\s*分)?(?![\d.,–-])")
REASON = re.compile(r"(?:reason|理由|原因)\W{0,6}(.+)", re.IGNORECASE | re.DOTALL)
MAX_TEXT = 8_000  # characters of a question or an answer
# Without text or not filled in, longer than MAX_TEXT, written twice, more than were asked for.
Dropped = Literal["blank", "long", "same", "surplus"]


@dataclass(frozen=True)
class Pair:
    question: str
    answer: str


@dataclass(frozen=True)
class Pairs:
    """The questions with their answers that were read, and how many were left out for which reason."""

    kept: Sequence[Pair]
    dropped: Mapping[Dropped, int]


@dataclass(frozen=True)
class Judgement:
    """How well a passage supports an answer, from 1 to 5, and why."""

    score: int
    reason: str


def read_pairs(text: str, most: int, complete: bool = True, opened: bool = False) -> Pairs:
    """At most `most` questions with their answers; none if there are none that can be read. In an answer that is not
    `complete`, because the model was cut off, the last of those written as lines is left out. `opened`: it begins
    within reasoning that the prompt opened."""
    text = split_reasoning(text, opened=opened or None).answer
    pairs = list(_pairs_in_json(text))
    if not pairs:
        pairs = list(_pairs_in_lines(text))
        pairs = pairs if complete else pairs[:-1]
    pairs = [Pair(REPEATED_FORM.sub("", pair.question), REPEATED_FORM.sub("", pair.answer)) for pair in pairs]
    kept, dropped = list[Pair](), Counter[Dropped]()
    for pair in pairs:
        if reason := _reason_to_drop(pair, kept, most):
            dropped[reason] += 1
        else:
            kept.append(pair)
    return Pairs(kept, dropped)


def _reason_to_drop(pair: Pair, kept: Sequence[Pair], most: int) -> Dropped | None:
    texts = (pair.question, pair.answer)
    if any(not text or text.casefold().strip(" .。") in PLACEHOLDERS for text in texts):
        return "blank"
    if max(map(len, texts)) > MAX_TEXT:
        return "long"
    if pair in kept:
        return "same"
    return "surplus" if len(kept) >= most else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, wherever they begin; a list that was cut off has whole ones in it, too."""
    decoder, at = json.JSONDecoder(strict=False), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
            yield value
        except (ValueError, RecursionError):
            at += 1


def _pairs_in_json(text: str) -> Iterator[Pair]:
    for value in _objects(text):
        yield from _pairs_in_value(value)


def _pairs_in_value(value: Any) -> Iterator[Pair]:
    """Those of an object, or of the objects in it, such as {"rows": [{…}]}."""
    if isinstance(value, list):
        for inner in value:
            yield from _pairs_in_value(inner)
    elif isinstance(value, dict):
        lowered = {str(key).strip().lower(): inner for key, inner in value.items()}
        question, answer = (_first_text(lowered, keys) for keys in (QUESTION_KEYS, ANSWER_KEYS))
        if question and answer:
            yield Pair(question, answer)
        else:
            yield from _pairs_in_value([inner for inner in value.values() if isinstance(inner, (dict, list))])


def _first_text(values: dict[str, Any], keys: tuple[str, ...]) -> str:
    texts = (values[key] for key in keys if isinstance(values.get(key), (str, int, float)))
    return str(next(texts, "")).strip()


def _pairs_in_lines(text: str) -> Iterator[Pair]:
    question, answer, into = list[str](), list[str](), list[str]()
    for line in [*text.splitlines(), "Q:"]:
        if begins := QUESTION_LINE.fullmatch(line):
            if question and answer:
                yield Pair("\n".join(question).strip(), "\n".join(answer).strip())
            question, answer = [begins[1]], []
            into = question
        elif (begins := ANSWER_LINE.fullmatch(line)) and question:
            if answer:  # a second answer to it is none
                into = []
                continue
            answer = [begins[1]]
            into = answer
        else:
            into.append(line)


def read_judgement(text: str, opened: bool = False) -> Judgement | None:
    """The score and the reason; None if there is no score that can be read. `opened`: as in `read_pairs`."""
    text = split_reasoning(text, opened=opened or None).answer
    for value in _objects(text):
        score = value.get("score", value.get("评分"))
        if str(score).strip() in ("1", "2", "3", "4", "5"):
            return Judgement(int(str(score)), str(value.get("reason", value.get("理由", ""))).strip()[:MAX_TEXT])
    labelled = after_labels(text, SCORE_LABEL, "[1-5]")
    if match := labelled[-1] if labelled else BARE_SCORE.match(text):
        reason = REASON.search(text, match.end())
        rest = reason[1] if reason else text[match.end() :].strip(" \n:：.。-–—*/分")
        return Judgement(int(match["choice"]), " ".join(rest.split())[:MAX_TEXT])
    return None
