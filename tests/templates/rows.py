"""Conversations of every kind, with unique words in each piece of each message,
so that a rendering tells where it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.templates.tokens import OWN

Message = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A word that stands nowhere else: which message it is in (-1: the tools), and in what of it."""

    word: str
    message: int
    kind: str  # system, question, text, reasoning, argument, name, id, result, tool


@dataclass
class Conversation:
    """A row and its marks. `forged`: the text of control tokens that values of it hold, which has to stay text."""

    name: str
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    marks: list[Mark] = field(default_factory=list)
    forged: tuple[str, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})

    def word(self, kind: str, message: int | None = None) -> str:
        at = len(self.messages) if message is None else message
        chance = random.Random(f"{self.name} {len(self.marks)}")
        word = "".join(chance.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 4)
        self.marks.append(Mark(word, at, kind))
        return word

    def words(self, kind: str) -> str:
        return f"{self.word(kind)}, and so it was {self.word(kind)}"

    def system(self, role: str = "system") -> Conversation:
        self.messages.append({"role": role, "content": self.words("system")})
        return self

    def user(self, pattern: str = "{}", *, after: bool = False) -> Conversation:
        """`after`: a word stands behind the pattern too."""
        content = pattern.format(self.words("question")) + (f" {self.word('question')}" if after else "")
        self.messages.append({"role": "user", "content": content})
        return self

    def answer(self, pattern: str = "{}", *, reasoning: bool = False, after: bool = False) -> Conversation:
        thought = {"reasoning_content": self.words("reasoning")} if reasoning else {}
        text = pattern.format(self.words("text")) if "{}" in pattern else pattern
        text += f" {self.word('text')}" if after else ""
        self.messages.append({"role": "assistant", "content": text, **thought})
        return self

    def thinking_inline(self) -> Conversation:
        thought, text = self.words("reasoning"), self.words("text")
        content = f"<think>\n{thought}\n</think>\n\n{text}"
        self.messages.append({"role": "assistant", "content": content})
        return self

    def offer(self, count: int = 1) -> Conversation:
        """Tools, before any message."""
        self.tools = [
            {
                "type": "function",
                "function": {
                    "name": self.word("name", -1),
                    "description": f"Looks up {self.word('tool', -1)}.",
                    "parameters": {
                        "type": "object",
                        "properties": {"place": {"type": "string", "description": "Where"}},
                        "required": ["place"],
                    },
                },
            }
            for _ in range(count)
        ]
        return self

    def call(self, count: int = 1, *, text: bool = False, reasoning: bool = False, ids: bool = True) -> Conversation:
        thought = {"reasoning_content": self.words("reasoning")} if reasoning else {}
        content = self.words("text") if text else ""
        calls = []
        for tool in self.tools[:count]:
            name = tool["function"]["name"]
            self.marks.append(Mark(name, len(self.messages), "name"))
            function = {"name": name, "arguments": {"place": self.words("argument")}}
            own = {"id": self._id()} if ids else {}
            calls.append(own | {"type": "function", "function": function})
        self.messages.append({"role": "assistant", "content": content, **thought, "tool_calls": calls})
        return self

    def results(self) -> Conversation:
        for call in self.messages[-1]["tool_calls"]:
            own = {"tool_call_id": call["id"], "name": call["function"]["name"]} if "id" in call else {}
            self.messages.append({"role": "tool", **own, "content": self.words("result")})
        return self

    def _id(self) -> str:
        """As Mistral's: nine letters and digits."""
        self.word("id")
        word = self.marks.pop().word
        self.marks.append(Mark(f"{word}1", len(self.messages), "id"))
        return f"{word}1"


def _long(c: Conversation) -> Conversation:
    for _ in range(6):
        c.user("{} " + "The quick brown fox. " * 6).answer("On and on. " * 9 + "{}")
    return c


# Name → what makes the conversation. The names are the columns of docs/templates.md.
KINDS: dict[str, Callable[[Conversation], Conversation]] = {
    "one turn": lambda c: c.user().answer(),
    "three turns": lambda c: c.user().answer().user().answer().user().answer(),
    "system": lambda c: c.system().user().answer(),
    "system, turns": lambda c: c.system().user().answer().user().answer(),
    "developer": lambda c: c.system("developer").user().answer(),
    "tools unused": lambda c: c.offer().user().answer().user().answer(),
    "call": lambda c: c.offer().user().call().results().answer(),
    "call, text": lambda c: c.offer().system().user().call(text=True).results().answer().user().answer(),
    "call, no id": lambda c: c.offer().user().call(ids=False).results().answer(),
    "parallel": lambda c: c.offer(2).user().call(2).results().answer(),
    "two rounds": lambda c: c.offer(2).user().call().results().call().results().answer().user().answer(),
    "ends in call": lambda c: c.offer().user().answer().user().call(),
    "reasoning": lambda c: c.user().answer().user().answer(reasoning=True),
    "reasoning, all": lambda c: c.user().answer(reasoning=True).user().answer(reasoning=True),
    "reasoning, call": lambda c: c.offer().user().call(reasoning=True).results().answer(reasoning=True),
    "inline think": lambda c: c.user().thinking_inline().user().thinking_inline(),
    "empty middle": lambda c: c.user().answer("").user().answer(),
    "empty last": lambda c: c.user().answer().user().answer(""),
    "blanks": lambda c: c.user(" \n {}  \n").answer("  {} \n").user("\n\n{} ").answer("\n {}\n\n"),
    "emoji": lambda c: c.user("🙂 {} 你好，世界").answer("👩‍👩‍👧 é {} 🏳️‍🌈").user("é{}。").answer("你好{}🙂"),
    "long": _long,
    "greeting": lambda c: c.answer().user().answer(),
    "two answers": lambda c: c.user().answer().answer().user().answer(),
    "two questions": lambda c: c.user().user().answer().user().user().answer(),
    "late system": lambda c: c.user().answer().system().user().answer(),
    "open question": lambda c: c.user().answer().user().answer().user(),
}
FORGED = "others' words"  # needs to know what the template writes between turns


def conversations(after_question: str, after_answer: str, special: tuple[str, ...]) -> list[Conversation]:
    """One of each kind. `after_question`, `after_answer`: what the template writes between turns, for data to forge;
    `special`: the special tokens in them."""
    made = [make(Conversation(name)) for name, make in KINDS.items()]
    forged = Conversation(FORGED, forged=special)
    # Without what a model writes itself, such as <think>: in an answer that is what it looks like.
    question, answer = (OWN.sub("", text).strip() for text in (after_question, after_answer))
    for text, other in ((question, answer), (answer, question)):
        forged.user("{} user: assistant " + _escaped(text), after=True)
        forged.answer("{} assistant: user " + _escaped(other), after=True)
    return [*made, forged]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
