"""What a chat template does, seen from a few of its renderings: the test's own reading, apart from the engine's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.templates.sources import Template
from tests.templates.tokens import spellings, tokenizer_for

UNWRITTEN = "<|endoftext|>"
Q1, A1, Q2, A2 = "quobaniru", "ansodelik", "questevum", "arbitosul"  # words that no template writes


class Unit(NamedTuple):
    """A control token or a single character that is not blank, and where in the text it ends."""

    text: str
    end: int
    special: bool


@dataclass
class Facts:
    """A template, a tokenizer for it, and where it begins and ends turns."""

    template: Template
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def of(cls, template: Template) -> Facts:
        """With the control tokens that are written, and the eos which the family is likely to have."""
        first = cls(template, tokenizer_for(template))
        rendering = "\n".join(map(first.written, (ASK, [*ASK, *ASK_AGAIN], [SYSTEM, *ASK], WITH_CALL)))
        second = cls(template, tokenizer_for(template, rendering=rendering))
        if "</s>" in rendering:
            return second
        # What the next message begins with ends no answer of its own: such families stop at a token never written.
        eos = next((ender for ender in reversed(second.enders) if ender != second.opener), UNWRITTEN)
        return cls(template, tokenizer_for(template, eos, rendering))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Any = None,
        generate: bool = False,
        forged: tuple[str, ...] = (),
    ) -> str | None:
        """None if the template raises. `forged`: special tokens that are mere text where data holds them, so that the
        template does not see them either."""
        if forged:
            stand_ins = {token: chr(0xF0000 + at) for at, token in enumerate(forged)}
            text = self.render([_replaced(message, stand_ins) for message in messages], tools, generate)
            return text and _replaced(text, {char: token for token, char in stand_ins.items()})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception:  # a template is a program, and may raise anything
            return None

    def written(self, messages: list[dict[str, Any]], generate: bool = False) -> str:
        """The same of a few plain messages, in parts if the template wants contents so; empty if it raises."""
        word = messages[0]["content"]
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        texts = [text for each in (messages, parts) if (text := self.render(each, None, generate)) is not None]
        return next((text for text in texts if word in text), texts[0] if texts else "")

    @cached_property
    def spellings(self) -> list[bytes]:
        return spellings(self.tokenizer)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        texts = sorted(
            (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special),
            key=len,
            reverse=True,
        )
        return re.compile("|".join(map(re.escape, texts)))

    @cached_property
    def _unit(self) -> re.Pattern[str]:
        texts = sorted((token.content for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, texts), r"\S"]))

    def units(self, text: str) -> list[Unit]:
        return [
            Unit(match[0], match.end(), self._special.fullmatch(match[0]) is not None)
            for match in self._unit.finditer(text)
        ]

    def shared(self, one: str, other: str) -> tuple[int, int]:
        """How much of `one` and of `other` is the same from the start, blanks left aside and no control token cut."""
        ends = (0, 0)
        for mine, theirs in zip(self.units(one), self.units(other), strict=False):
            if mine.text != theirs.text:
                break
            ends = mine.end, theirs.end
        return ends

    @cached_property
    def marks(self) -> bool:
        """The template itself marks what is to be trained."""
        return re.search(r"\{%-?\s*generation\b", self.template.text) is not None

    @cached_property
    def talk(self) -> str:
        """Two questions and answers."""
        return self.written([*ASK, *ASK_AGAIN])

    @cached_property
    def after_question(self) -> str:
        return between(self.talk, Q1, A1)

    @cached_property
    def after_answer(self) -> str:
        return between(self.talk, A1, Q2)

    @cached_property
    def between_turns(self) -> tuple[str, ...]:
        """The special tokens that the template writes between turns, longest first."""
        units = self.units(self.after_question + self.after_answer)
        return tuple(sorted({unit.text for unit in units if unit.special}, key=len, reverse=True))

    @cached_property
    def at_the_end(self) -> str:
        """What follows the last answer."""
        text = self.talk or self.written(ASK)
        return text.rpartition(A2 if self.talk else A1)[2]

    @cached_property
    def added_by_prompt(self) -> str:
        """What asking for a generation prompt adds to a question."""
        plain, prompt = self.written(ASK[:1]), self.written(ASK[:1], generate=True)
        return prompt[len(plain) :] if prompt.startswith(plain) else prompt.rpartition(Q1)[2]

    @cached_property
    def opener(self) -> str | None:
        """The special token that begins a question: it stands before the first one and before a later one, and not
        behind an answer."""
        later = [unit for unit in self.units(self.after_answer) if unit.special]
        end = next((unit.text for unit in self.units(self.at_the_end) if unit.special), None)
        for unit in self.units(self.talk.partition(Q1)[0]):
            if unit.special and unit.text != end and unit.text in {each.text for each in later}:
                return unit.text
        _, shared = self.shared(self.at_the_end, self.after_answer)
        return next((unit.text for unit in later if unit.end > shared), None)

    @cached_property
    def ends_question(self) -> str | None:
        """The special token that ends a question, where the template shows one without an answer."""
        alone = self.written(ASK[:1]).rpartition(Q1)[2] if self.added_by_prompt.strip() else ""
        return next((unit.text for unit in reversed(self.units(alone)) if unit.special), None)

    @cached_property
    def opening(self) -> list[str]:
        """The last few units of what opens every answer: the generation prompt and the history have it in common."""
        prompt = self.written(ASK[:1], generate=True).rpartition(Q1)[2]
        common, _ = self.shared(prompt, self.after_question)
        return [unit.text for unit in self.units(prompt[:common])][-4:]

    def special_in(self, text: str) -> list[Unit]:
        """The special tokens of what follows an answer, up to the one that begins the next message."""
        special = [unit for unit in self.units(text) if unit.special]
        opens = next((at for at, unit in enumerate(special) if unit.text == self.opener), 0)
        return special[:opens] if opens else special

    @cached_property
    def enders(self) -> list[str]:
        """The special tokens that end an answer of text: in the middle, and at the end of a conversation."""
        end = self.ends_in(self.at_the_end, None)
        middle = self.ends_in(self.at_the_end, self.after_answer) if self.talk else []
        return list(dict.fromkeys(unit.text for unit in [*middle, *end]))

    def ends_in(self, alone: str, followed: str | None) -> list[Unit]:
        """The special token that ends an answer, out of what follows it.

        `alone`: what follows where the conversation ends with it. `followed`: what follows it here, up to the next
        message's content; None if nothing does. The unit's position is in `followed` if that is not None. Empty where
        the template writes none; several where more than one may be meant.
        """
        closing = self.special_in(alone)
        if followed is None:
            return [*closing[-1:], *(unit for unit in closing[:-1] if unit.text == self.ends_question)]
        here = self.special_in(followed)
        _, shared = self.shared(alone, followed)
        common = [unit for unit in here if unit.end <= shared]
        # What ends everybody's message ends this one, even if something is written behind it (Phi 3, Apriel).
        everybodys = [unit for unit in common[:-1] if unit.text == self.ends_question]
        return [*common[-1:], *everybodys] if common else here[:1]

    @cached_property
    def openers(self) -> set[str]:
        """Special tokens that open a message and end none."""
        if not self.talk:
            return set()
        ends = self.ends_in(self.at_the_end, self.after_answer)
        behind = self.after_answer[ends[0].end :] if ends and self.closes else ""
        header = self.added_by_prompt if self.added_by_prompt.strip() else ""
        written = {unit.text for unit in self.units(behind + header) if unit.special}
        return written - set(self.enders)

    @cached_property
    def closes(self) -> bool:
        """The template writes a special token behind the last answer."""
        return bool(self.special_in(self.at_the_end))


def _replaced(value: Any, by: dict[str, str]) -> Any:
    if isinstance(value, str):
        for old, new in by.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {key: _replaced(part, by) for key, part in value.items()}
    return [_replaced(part, by) for part in value] if isinstance(value, list) else value


ASK = [{"role": "user", "content": Q1}, {"role": "assistant", "content": A1}]
SYSTEM = {"role": "system", "content": Q2}
CALL = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": "y"}}}
WITH_CALL = [
    ASK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": Q2},
    ASK[1],
]
ASK_AGAIN = [{"role": "user", "content": Q2}, {"role": "assistant", "content": A2}]


def between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]
