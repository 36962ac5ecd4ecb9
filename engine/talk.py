"""A conversation of one person with several voices: what each has been told so far, as a file, and as rows to learn from.

It is kept by whoever talks (in the browser), so everything here is a value, and what comes back is read with care.
Asking is left to `engine.chat`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from engine import catalogue
from engine.asking import Answer
from engine.datasets import read_catalogue
from engine.problems import Refusal, problem
from engine.rundir import append_lines

THUMBS, PAIRS = "chat_thumbs", "chat_pairs"  # the data sets that ratings go into
Message = dict[str, str]
Rating = Literal["", "up", "down"]


@dataclass(frozen=True)
class Said:
    """What one voice answered, how fast, and what the reader thought of it."""

    text: str
    tokens: int = 0
    first_s: float | None = None
    tokens_per_s: float | None = None
    finish: str = ""
    score: float | None = None  # of a reward model
    rating: Rating = ""
    preferred: bool = False


@dataclass(frozen=True)
class Turn:
    """One question and the answers to it, by voice. One that stands `alone` was asked as if nothing had been said."""

    question: str
    system: str = ""
    said: Mapping[str, Said] = field(default_factory=dict)
    alone: bool = False


Talk = tuple[Turn, ...]


def turn(
    question: str, system: str, told: Sequence[Answer], scores: Mapping[str, float], alone: bool = False
) -> Turn | None:
    """A question and what has been answered; None if nobody has answered anything."""
    said = {
        one.voice: Said(
            one.text, one.tokens, one.first_s, one.tokens_per_s, one.finish, scores.get(one.voice)
        )
        for one in told
        if one.text or not one.problem
    }
    return Turn(question, system, said, alone) if said else None


def read(kept: Any) -> Talk:
    """The conversation as a browser has kept it; an empty one where that is none."""
    try:
        return tuple(
            Turn(
                str(turn["question"]),
                str(turn["system"]),
                {str(voice): Said(**one) for voice, one in turn["said"].items()},
                bool(turn["alone"]),
            )
            for turn in kept or ()
        )
    except (TypeError, KeyError, AttributeError):
        return ()


def kept(talk: Talk) -> list[dict[str, Any]]:
    """The conversation for a browser to keep."""
    return [asdict(turn) for turn in talk]


def messages(talk: Talk, voice: str, system: str = "") -> list[Message]:
    """What a voice has heard and said since the last turn that stood alone. A turn that it was not there for is told
    with the first answer it got."""
    told = begun = [{"role": "system", "content": system}] if system.strip() else []
    for turn in talk:
        told = begun if turn.alone else told
        answers = [turn.said[voice]] if voice in turn.said else list(turn.said.values())
        if answers:
            told = [
                *told,
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": answers[0].text},
            ]
    return told


def prompt(talk: Talk, voice: str, number: int) -> list[Message]:
    """What a voice was asked in turn `number`, the question included."""
    turn = talk[number]
    before = () if turn.alone else talk[:number]
    return [*messages(before, voice, turn.system), {"role": "user", "content": turn.question}]


def jsonl(talk: Talk) -> str:
    """One line for each voice, and for each turn that stands alone, {"messages", "model"}: a data set as it is."""
    voices = dict.fromkeys(voice for turn in talk for voice in turn.said)
    ends = [end for end in range(1, len(talk) + 1) if end == len(talk) or talk[end].alone]
    rows = (
        {"messages": messages(talk[:end], voice, talk[end - 1].system), "model": voice}
        for end in ends
        for voice in voices
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------ ratings


def thumb(data_dir: Path, talk: Talk, number: int, voice: str, up: bool) -> Talk:
    """Keep that an answer is good or bad, as a row for KTO; returns the conversation with the mark. Raises Refusal."""
    said = _said(talk, number, voice)
    if said.rating:
        return talk  # a row that is written stays written
    answer = {"role": "assistant", "content": said.text}
    row = {"messages": [*prompt(talk, voice, number), answer], "kto_tag": up, "model": voice}
    entry = {"formatting": "openai", "columns": {"messages": "messages", "kto_tag": "kto_tag"}}
    _append(data_dir, THUMBS, [row], entry)
    return _marked(talk, number, voice, rating="up" if up else "down")


def prefer(data_dir: Path, talk: Talk, number: int, voice: str) -> Talk:
    """Keep that an answer is better than the others to the same question, as a pair with each of them.

    Raises Refusal if there is no other answer that differs and was given to the same conversation.
    """
    said = _said(talk, number, voice)
    if any(one.preferred for one in talk[number].said.values()):
        return talk
    asked = prompt(talk, voice, number)
    others = {
        other: one
        for other, one in talk[number].said.items()
        if one.text.strip() and one.text != said.text and prompt(talk, other, number) == asked
    }
    if not others:
        raise Refusal(problem("rating-alone"))
    rows = [
        {
            "messages": asked, "chosen": {"role": "assistant", "content": said.text},
            "rejected": {"role": "assistant", "content": one.text}, "model": voice, "rejected_model": other,
        }
        for other, one in others.items()
    ]  # fmt: skip
    columns = {name: name for name in ("messages", "chosen", "rejected")}
    _append(data_dir, PAIRS, rows, {"formatting": "openai", "ranking": True, "columns": columns})
    return _marked(talk, number, voice, preferred=True)


def _said(talk: Talk, number: int, voice: str) -> Said:
    if not 0 <= number < len(talk) or voice not in talk[number].said:
        raise Refusal(problem("rating-unknown"))
    said = talk[number].said[voice]
    if not said.text.strip():
        raise Refusal(problem("rating-empty"))
    return said


def _marked(talk: Talk, number: int, voice: str, **marks: Any) -> Talk:
    turn = talk[number]
    said = {**turn.said, voice: replace(turn.said[voice], **marks)}
    return (*talk[:number], replace(turn, said=said), *talk[number + 1 :])


def _append(data_dir: Path, name: str, rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
    """Add rows to the file of a data set, and the set to the catalogue if it is not there."""
    file = data_dir / f"{name}.jsonl"
    try:
        append_lines(file, rows)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error
    if not _named(file, (one.files for one in read_catalogue(data_dir)[0])):
        catalogue.add(data_dir, name, {"file_name": file.name, **entry})


def _named(file: Path, known: Iterable[Sequence[Path]]) -> bool:
    return any(file.resolve() == one.resolve() for files in known for one in files)
