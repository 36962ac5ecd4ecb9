"""A conversation of one person with several served models: the messages of each, as a file, and as rows to learn from.

The browser keeps it, so everything here is a value, and what comes back is not trusted. Requests are left to
`engine.serving.chat_client`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from engine.core.problems import Refusal, problem
from engine.core.reasoning import content_of
from engine.core.rundir import append_lines
from engine.data import dataset_info_edits
from engine.data.datasets import read_dataset_info
from engine.serving.attachments import OWN_URL
from engine.serving.chat_client import Answer, ToolCall

RATINGS_DATASET, PREFERENCES_DATASET = "chat_thumbs", "chat_pairs"  # the data sets that receive ratings
MAX_HISTORY = 40  # number of earlier conversations that are kept, and
MAX_HISTORY_CHARACTERS = 1_000_000  # their characters: a browser stores about five million
# A short template for a tool.
TOOL_EXAMPLE = '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
Message = dict[str, Any]
Tools = tuple[dict[str, Any], ...]
Rating = Literal["", "up", "down"]


@dataclass(frozen=True)
class Reply:
    """The answer of one served model, its speed, and the reader's rating."""

    text: str
    tokens: int = 0
    first_s: float | None = None
    tokens_per_s: float | None = None
    finish: str = ""
    score: float | None = None  # by a reward model
    rating: Rating = ""
    preferred: bool = False
    calls: tuple[ToolCall, ...] = ()
    opened: bool = False  # it begins within reasoning that the prompt opened

    @property
    def message(self) -> Message:
        """The answer as chat templates expect it."""
        message = {"role": "assistant", **content_of(self.text)}
        calls = [{"type": "function", "function": dict(call)} for call in self.calls]
        return message | ({"tool_calls": calls} if calls else {})

    @property
    def empty(self) -> bool:
        return not self.text.strip() and not self.calls


@dataclass(frozen=True)
class Turn:
    """One question and its answers, by served model; none while it is being answered. `failed`: the models that ended
    with an error before their first word.

    It follows the turn in place `after`; one that stands `alone` was asked as if nothing came before it. A question
    with the role "tool" contains the results of the tools that were called before.
    """

    question: str
    system: str = ""
    said: dict[str, Reply] = field(default_factory=dict)
    alone: bool = False
    role: Literal["user", "tool"] = "user"
    tools: Tools = ()
    after: int = -1
    images: tuple[str, ...] = ()  # data URLs
    failed: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether an answer was ended by an error or by the reader, or is missing."""
        ended = any(reply.finish in ("error", "cancelled") for reply in self.said.values())
        return not self.said or bool(self.failed) or ended

    @property
    def message(self) -> Message:
        if not self.images:
            return {"role": self.role, "content": self.question}
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        return {"role": self.role, "content": [*parts, {"type": "text", "text": self.question}]}


@dataclass(frozen=True)
class Conversation:
    """A tree of turns, each in its place after the one it follows. The path from a first turn to `tip` is shown.
    Another question at any of them starts another branch."""

    turns: tuple[Turn, ...] = ()
    tip: int = -1

    def path(self, tip: int | None = None) -> tuple[int, ...]:
        """The places of the turns that lead to `tip`, which is the last."""
        places, place = [], self.tip if tip is None else tip
        while place >= 0:
            places.append(place)
            place = self.turns[place].after
        return tuple(reversed(places))

    def turns_on_path(self, tip: int | None = None) -> tuple[Turn, ...]:
        """The turns that lead to `tip`."""
        return tuple(self.turns[place] for place in self.path(tip))

    def children(self, place: int) -> tuple[int, ...]:
        """The places of the turns that follow the one in `place`; -1: those that follow none."""
        return tuple(number for number, turn in enumerate(self.turns) if turn.after == place)

    def last_models(self) -> list[str]:
        """The models that answered last on the path to the tip; before its first answer, those that answered last
        anywhere."""
        turns = [*self.turns, *self.turns_on_path()]
        return next((list(turn.said) for turn in reversed(turns) if turn.said), [])

    def add(self, turn: Turn) -> Conversation:
        """The conversation with one more turn after its tip."""
        return Conversation((*self.turns, replace(turn, after=self.tip)), len(self.turns))

    def before(self, place: int) -> Conversation:
        """The conversation up to the turn before `place`; what followed becomes another branch."""
        return replace(self, tip=self.turns[place].after)

    def without_tip(self) -> Conversation:
        """The conversation without its tip, which will be asked again; one without answers is dropped."""
        last = self.turns[self.tip]
        if last.said or self.tip != len(self.turns) - 1:
            return self.before(self.tip)
        return Conversation(self.turns[:-1], last.after)

    def to_newest_tip(self, place: int) -> Conversation:
        """The conversation with its tip at the newest turn after `place`."""
        while later := self.children(place):
            place = later[-1]
        return replace(self, tip=place)


def answered_turn(question: Turn, answers: Sequence[Answer], scores: Mapping[str, float]) -> Turn | None:
    """A question with its answers; None if there are none."""
    failed = [answer.model for answer in answers if answer.problem and not (answer.text or answer.calls)]
    replies = {
        answer.model: Reply(
            answer.text,
            answer.tokens,
            answer.first_s,
            answer.tokens_per_s,
            answer.finish,
            scores.get(answer.model),
            calls=answer.calls,
            opened=answer.opened,
        )
        for answer in answers
        if answer.model not in failed
    }
    return replace(question, said=replies, failed=tuple(failed)) if replies else None


def parse_tools(text: str) -> Tools:
    """The functions in `text`, in OpenAI's format, alone or in a list. Raises Refusal."""
    if not text.strip():
        return ()
    try:
        definitions = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal(problem("chat-tools-json", why=error.msg, line=error.lineno, column=error.colno)) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of brackets
        raise Refusal(problem("chat-tools-json", why=type(error).__name__, line=1, column=1)) from error
    tools = [
        definition
        if isinstance(definition, dict) and "function" in definition
        else {"type": "function", "function": definition}
        for definition in (definitions if isinstance(definitions, list) else [definitions])
    ]
    functions = [tool["function"] for tool in tools]
    if not all(
        isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"].strip()
        for function in functions
    ):
        raise Refusal(problem("chat-tools-shape", example=TOOL_EXAMPLE))
    return tuple(tools)


_CONVERSATION = TypeAdapter(Conversation)


def read(stored: Any) -> Conversation:
    """The conversation as stored by a browser; an empty one if that is invalid."""
    try:
        conversation = _CONVERSATION.validate_python(stored)
    except ValidationError:
        return Conversation()
    places = [
        *((turn.after, place) for place, turn in enumerate(conversation.turns)),
        (conversation.tip, len(conversation.turns)),
    ]
    own = all(OWN_URL.fullmatch(url) for turn in conversation.turns for url in turn.images)
    return conversation if own and all(-1 <= place < end for place, end in places) else Conversation()


def as_plain(conversation: Conversation) -> dict[str, Any]:
    """The conversation for a browser to store."""
    return asdict(conversation)


def with_archived(history: Sequence[Any], conversation: Conversation) -> list[Any]:
    """Earlier conversations as a browser stores them, with a new one in front; the oldest are dropped if there are too
    many."""
    known = [
        entry for entry in ([as_plain(conversation)] if conversation.turns else []) + list(history) if read(entry).turns
    ][:MAX_HISTORY]
    sizes = [len(json.dumps(entry)) for entry in known]
    # The newest one is kept, however long it is, since it is nowhere else.
    return [
        entry for number, entry in enumerate(known) if not number or sum(sizes[: number + 1]) <= MAX_HISTORY_CHARACTERS
    ]


def messages(turns: Sequence[Turn], model: str, system: str = "") -> list[Message]:
    """The messages of a served model since the last turn that stood alone. A turn that it did not answer is included
    with its first answer; of tools, only the results of a call that is among its messages."""
    conversation = begun = [{"role": "system", "content": system}] if system.strip() else []
    answerer = ""  # whose answer was included last
    for turn in turns:
        conversation = begun if turn.alone else conversation
        if model in turn.said:
            answerer = model
        elif turn.role == "user":
            answerer = next(iter(turn.said), "")
        if answerer in turn.said:
            conversation = [*conversation, turn.message, turn.said[answerer].message]
    return conversation


def prompt(conversation: Conversation, model: str, place: int) -> list[Message]:
    """The messages sent to a model in the turn in `place`, including the question."""
    turn = conversation.turns[place]
    return messages_before_answer(conversation.turns_on_path(turn.after), model, turn)


def messages_before_answer(before: Sequence[Turn], model: str, turn: Turn) -> list[Message]:
    """The messages sent to a model in a turn that follows those `before`."""
    return [*messages(() if turn.alone else before, model, turn.system), turn.message]


def jsonl(conversation: Conversation) -> str:
    """The path to the tip as JSONL, a line for each model and for each turn that stands alone, {"messages", "tools",
    "model"}: usable as a data set."""
    turns = [turn for turn in conversation.turns_on_path() if turn.said]
    models = dict.fromkeys(model for turn in turns for model in turn.said)
    ends = [end for end in range(1, len(turns) + 1) if end == len(turns) or turns[end].alone]
    rows = (
        {"messages": messages(turns[:end], model, turns[end - 1].system), **_tools(turns[end - 1]), "model": model}
        for end in ends
        for model in models
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tools(turn: Turn) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in turn.tools]} if turn.tools else {}


# ------------------------------------------------------------------------------------------ ratings


def rate(data_dir: Path, conversation: Conversation, place: int, model: str, up: bool) -> Conversation:
    """Append an answer as good or bad, as a row for KTO; returns the conversation with the mark. Raises Refusal."""
    reply = _ratable_reply(conversation, place, model)
    if reply.rating:
        return conversation  # a row that has been written stays written
    exchange = [*prompt(conversation, model, place), reply.message]
    row = {"messages": exchange, **_tools(conversation.turns[place]), "kto_tag": up, "model": model}
    entry = {"formatting": "openai", "columns": {name: name for name in ("messages", "kto_tag", "tools")}}
    _append(data_dir, RATINGS_DATASET, [row], entry)
    return _with_marks(conversation, place, model, rating="up" if up else "down")


def prefer(data_dir: Path, conversation: Conversation, place: int, model: str) -> Conversation:
    """Append an answer as better than the others to the same question, as a pair with each of them.

    Raises Refusal if there is no different answer to the same conversation.
    """
    reply, turn = _ratable_reply(conversation, place, model), conversation.turns[place]
    if any(answer.preferred for answer in turn.said.values()):
        return conversation
    question = prompt(conversation, model, place)
    others = {
        other: alternative
        for other, alternative in turn.said.items()
        if not alternative.empty
        and alternative.message != reply.message
        and prompt(conversation, other, place) == question
    }
    if not others:
        raise Refusal(problem("rating-alone"))
    rows = [
        {
            "messages": question,
            "chosen": reply.message,
            "rejected": alternative.message,
            **_tools(turn),
            "model": model,
            "rejected_model": other,
        }
        for other, alternative in others.items()
    ]
    columns = {name: name for name in ("messages", "chosen", "rejected", "tools")}
    _append(data_dir, PREFERENCES_DATASET, rows, {"formatting": "openai", "ranking": True, "columns": columns})
    return _with_marks(conversation, place, model, preferred=True)


def _ratable_reply(conversation: Conversation, place: int, model: str) -> Reply:
    if not 0 <= place < len(conversation.turns) or model not in conversation.turns[place].said:
        raise Refusal(problem("rating-unknown"))
    reply = conversation.turns[place].said[model]
    if reply.empty:
        raise Refusal(problem("rating-empty"))
    return reply


def _with_marks(conversation: Conversation, place: int, model: str, **marks: Any) -> Conversation:
    turn = conversation.turns[place]
    replies = {**turn.said, model: replace(turn.said[model], **marks)}
    turns = (*conversation.turns[:place], replace(turn, said=replies), *conversation.turns[place + 1 :])
    return replace(conversation, turns=turns)


def _append(data_dir: Path, name: str, rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
    """Add rows to the file of a data set, and the set to dataset_info.json if it is not there."""
    file = data_dir / f"{name}.jsonl"
    try:
        append_lines(file, rows)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error
    if not _is_listed(file, (dataset.files for dataset in read_dataset_info(data_dir)[0])):
        dataset_info_edits.add(data_dir, name, {"file_name": file.name, **entry})


def _is_listed(file: Path, known: Iterable[Sequence[Path]]) -> bool:
    return any(file.resolve() == path.resolve() for files in known for path in files)
