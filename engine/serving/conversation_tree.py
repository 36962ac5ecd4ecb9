"""A conversation of one person with several voices: what each has been told so far, as a file, and as rows to learn from.

It is kept by whoever talks (in the browser), so everything here is a value, and what comes back is read with care.
Asking is left to `engine.serving.chat_client`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes the standard one from Python 3.12 on

from engine.core.problems import Refusal, problem
from engine.core.rundir import append_lines
from engine.data import dataset_info_edits
from engine.data.datasets import read_catalogue
from engine.serving.chat_client import Answer

THUMBS, PAIRS = "chat_thumbs", "chat_pairs"  # the data sets that ratings go into
SHELF = 40  # earlier conversations that are kept, and
SHELF_SIZE = 1_000_000  # characters of them: a browser holds some five million
# How a tool is written down, shortly.
TOOL = (
    '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
)
Message = dict[str, Any]
Tools = tuple[dict[str, Any], ...]
Rating = Literal["", "up", "down"]


class Called(TypedDict):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


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
    calls: tuple[Called, ...] = ()

    @property
    def message(self) -> Message:
        """The answer as chat templates take it."""
        told = {"role": "assistant", "content": self.text}
        calls = [{"type": "function", "function": dict(call)} for call in self.calls]
        return told | ({"tool_calls": calls} if calls else {})

    @property
    def empty(self) -> bool:
        return not self.text.strip() and not self.calls


@dataclass(frozen=True)
class Turn:
    """One question and the answers to it, by voice; none while it is being answered.

    It follows the turn in place `after`; one that stands `alone` was asked as if nothing had been said. A question in
    the role "tool" is what the tools answered that were called before.
    """

    question: str
    system: str = ""
    said: dict[str, Said] = field(default_factory=dict)
    alone: bool = False
    role: Literal["user", "tool"] = "user"
    tools: Tools = ()
    after: int = -1

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.question}


@dataclass(frozen=True)
class Talk:
    """A tree of turns, each in its place behind the one it follows. What is read is the way from a first turn to `tip`:
    whoever asks otherwise, at any of them, begins another branch."""

    turns: tuple[Turn, ...] = ()
    tip: int = -1

    def way(self, tip: int | None = None) -> tuple[int, ...]:
        """The places of the turns that lead to `tip`, itself the last."""
        places, place = [], self.tip if tip is None else tip
        while place >= 0:
            places.append(place)
            place = self.turns[place].after
        return tuple(reversed(places))

    def told(self, tip: int | None = None) -> tuple[Turn, ...]:
        """The turns that lead to `tip`."""
        return tuple(self.turns[place] for place in self.way(tip))

    def behind(self, place: int) -> tuple[int, ...]:
        """The places of the turns that follow the one in `place`; -1: those that follow none."""
        return tuple(number for number, turn in enumerate(self.turns) if turn.after == place)

    def voices(self) -> list[str]:
        """Who answered last on the way that is read; before its first answer, who answered last anywhere."""
        turns = [*self.turns, *self.told()]
        return next((list(turn.said) for turn in reversed(turns) if turn.said), [])

    def add(self, turn: Turn) -> Talk:
        """The conversation with one more turn behind its tip."""
        return Talk((*self.turns, replace(turn, after=self.tip)), len(self.turns))

    def before(self, place: int) -> Talk:
        """The conversation as it was before the turn in `place`; what followed is another branch now."""
        return replace(self, tip=self.turns[place].after)

    def again(self) -> Talk:
        """The conversation as it was before its tip, which is to be asked once more; one without answers is forgotten."""
        last = self.turns[self.tip]
        if last.said or self.tip != len(self.turns) - 1:
            return self.before(self.tip)
        return Talk(self.turns[:-1], last.after)

    def onward(self, place: int) -> Talk:
        """The conversation read by way of `place`, on to the newest end."""
        while later := self.behind(place):
            place = later[-1]
        return replace(self, tip=place)


def turn(question: Turn, answers: Sequence[Answer], scores: Mapping[str, float]) -> Turn | None:
    """A question with what has been answered; None if nobody has answered anything."""
    said = {
        one.voice: Said(
            one.text, one.tokens, one.first_s, one.tokens_per_s, one.finish, scores.get(one.voice), calls=one.calls
        )
        for one in answers
        if one.text or one.calls or not one.problem
    }  # fmt: skip
    return replace(question, said=said) if said else None


def tools_of(text: str) -> Tools:
    """The functions that are written in `text` as OpenAI writes them, alone or in a list. Raises Refusal."""
    if not text.strip():
        return ()
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal(
            problem("chat-tools-json", why=error.msg, line=error.lineno, column=error.colno)
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise Refusal(problem("chat-tools-json", why=type(error).__name__, line=1, column=1)) from error
    tools = [
        one if isinstance(one, dict) and "function" in one else {"type": "function", "function": one}
        for one in (found if isinstance(found, list) else [found])
    ]
    functions = [tool["function"] for tool in tools]
    if not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and one["name"].strip()
        for one in functions
    ):
        raise Refusal(problem("chat-tools-shape", example=TOOL))
    return tuple(tools)


_TALK = TypeAdapter(Talk)


def read(kept: Any) -> Talk:
    """The conversation as a browser has kept it; an empty one where that is none."""
    try:
        talk = _TALK.validate_python(kept)
    except ValidationError:
        return Talk()
    places = [*((one.after, place) for place, one in enumerate(talk.turns)), (talk.tip, len(talk.turns))]
    return talk if all(-1 <= place < end for place, end in places) else Talk()


def kept(talk: Talk) -> dict[str, Any]:
    """The conversation for a browser to keep."""
    return asdict(talk)


def shelved(shelf: Sequence[Any], talk: Talk) -> list[Any]:
    """Earlier conversations as a browser keeps them, with one more in front; the oldest leave when there are too many."""
    known = [one for one in ([kept(talk)] if talk.turns else []) + list(shelf) if read(one).turns][:SHELF]
    sizes = [len(json.dumps(one)) for one in known]
    # The one that was just put away stays, however long it is: it is nowhere else.
    return [one for number, one in enumerate(known) if not number or sum(sizes[: number + 1]) <= SHELF_SIZE]


def messages(turns: Sequence[Turn], voice: str, system: str = "") -> list[Message]:
    """What a voice has heard and said since the last turn that stood alone. A turn that it was not there for is told
    with the first answer it got; but of tools only what was answered to a call that it heard."""
    told = begun = [{"role": "system", "content": system}] if system.strip() else []
    heard = ""  # whose answer was told last
    for turn in turns:
        told = begun if turn.alone else told
        if voice in turn.said:
            heard = voice
        elif turn.role == "user":
            heard = next(iter(turn.said), "")
        if heard in turn.said:
            told = [*told, turn.message, turn.said[heard].message]
    return told


def prompt(talk: Talk, voice: str, place: int) -> list[Message]:
    """What a voice was asked in the turn in `place`, the question included."""
    turn = talk.turns[place]
    return asked(talk.told(turn.after), voice, turn)


def asked(before: Sequence[Turn], voice: str, turn: Turn) -> list[Message]:
    """What a voice is asked in a turn that follows those `before`."""
    return [*messages(() if turn.alone else before, voice, turn.system), turn.message]


def jsonl(talk: Talk) -> str:
    """What is read, a line for each voice and for each turn that stands alone, {"messages", "tools", "model"}: a data
    set as it is."""
    turns = [turn for turn in talk.told() if turn.said]
    voices = dict.fromkeys(voice for turn in turns for voice in turn.said)
    ends = [end for end in range(1, len(turns) + 1) if end == len(turns) or turns[end].alone]
    rows = (
        {"messages": messages(turns[:end], voice, turns[end - 1].system), **_tools(turns[end - 1]), "model": voice}
        for end in ends
        for voice in voices
    )  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tools(turn: Turn) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in turn.tools]} if turn.tools else {}


# ------------------------------------------------------------------------------------------ ratings


def thumb(data_dir: Path, talk: Talk, place: int, voice: str, up: bool) -> Talk:
    """Keep that an answer is good or bad, as a row for KTO; returns the conversation with the mark. Raises Refusal."""
    said = _said(talk, place, voice)
    if said.rating:
        return talk  # a row that is written stays written
    heard = [*prompt(talk, voice, place), said.message]
    row = {"messages": heard, **_tools(talk.turns[place]), "kto_tag": up, "model": voice}
    entry = {"formatting": "openai", "columns": {name: name for name in ("messages", "kto_tag", "tools")}}
    _append(data_dir, THUMBS, [row], entry)
    return _marked(talk, place, voice, rating="up" if up else "down")


def prefer(data_dir: Path, talk: Talk, place: int, voice: str) -> Talk:
    """Keep that an answer is better than the others to the same question, as a pair with each of them.

    Raises Refusal if there is no other answer that differs and was given to the same conversation.
    """
    said, turn = _said(talk, place, voice), talk.turns[place]
    if any(one.preferred for one in turn.said.values()):
        return talk
    asked = prompt(talk, voice, place)
    others = {
        other: one
        for other, one in turn.said.items()
        if not one.empty and one.message != said.message and prompt(talk, other, place) == asked
    }
    if not others:
        raise Refusal(problem("rating-alone"))
    rows = [
        {
            "messages": asked, "chosen": said.message, "rejected": one.message, **_tools(turn), "model": voice,
            "rejected_model": other,
        }
        for other, one in others.items()
    ]  # fmt: skip
    columns = {name: name for name in ("messages", "chosen", "rejected", "tools")}
    _append(data_dir, PAIRS, rows, {"formatting": "openai", "ranking": True, "columns": columns})
    return _marked(talk, place, voice, preferred=True)


def _said(talk: Talk, place: int, voice: str) -> Said:
    if not 0 <= place < len(talk.turns) or voice not in talk.turns[place].said:
        raise Refusal(problem("rating-unknown"))
    said = talk.turns[place].said[voice]
    if said.empty:
        raise Refusal(problem("rating-empty"))
    return said


def _marked(talk: Talk, place: int, voice: str, **marks: Any) -> Talk:
    turn = talk.turns[place]
    said = {**turn.said, voice: replace(turn.said[voice], **marks)}
    turns = (*talk.turns[:place], replace(turn, said=said), *talk.turns[place + 1 :])
    return replace(talk, turns=turns)


def _append(data_dir: Path, name: str, rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
    """Add rows to the file of a data set, and the set to the catalogue if it is not there."""
    file = data_dir / f"{name}.jsonl"
    try:
        append_lines(file, rows)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error
    if not _named(file, (one.files for one in read_catalogue(data_dir)[0])):
        dataset_info_edits.add(data_dir, name, {"file_name": file.name, **entry})


def _named(file: Path, known: Iterable[Sequence[Path]]) -> bool:
    return any(file.resolve() == one.resolve() for files in known for one in files)
