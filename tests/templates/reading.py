"""Where in a rendered conversation each answer has to begin and to end: read off the words it holds, not the engine."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.templates.facts import Facts, Unit
from tests.templates.rows import Conversation, Message

TRAINED_KINDS = {"text", "reasoning", "argument"}
FOREIGN_KINDS = {"system", "question", "result", "tool"}


MADE = "made0000"  # begins ids that the data does not have


@dataclass
class Expected:
    """An answer: where it may begin (from `first` to `latest`), the tokens that may end it (`ends`: where each begins
    and ends), the place of its first word, and whether it runs on into the next answer (`merged`)."""

    message: int
    first: int
    latest: int
    ends: list[tuple[int, int]]
    word: int | None
    merged: bool = False


def variants(conversation: Conversation) -> Iterator[list[Message]]:
    """The same messages in the spellings that templates ask for: arguments as an object or as JSON text; no content
    beside a call; ids where the data has none; what the system says in front of the question; contents in parts; and
    what is thought in another place."""
    for text_arguments in (False, True):
        for spelling in (_as_it_is, _null_content, _with_ids, _system_role, _system_in_question, _parts):
            messages = spelling(copy.deepcopy(conversation.messages))
            if messages is None:
                continue
            calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
            if text_arguments and not calls:
                continue
            for function in calls:
                if text_arguments:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            yield messages
    yield from _thoughts_moved(conversation)


def _as_it_is(messages: list[Message]) -> list[Message]:
    return messages


def _null_content(messages: list[Message]) -> list[Message] | None:
    calls = [message for message in messages if message.get("tool_calls") and not message["content"]]
    for message in calls:
        message["content"] = None
    return messages if calls else None


def _with_ids(messages: list[Message]) -> list[Message] | None:
    calls = [call for message in messages for call in message.get("tool_calls", ()) if "id" not in call]
    for number, call in enumerate(calls):
        call["id"] = f"{MADE}{number}"
    results = [message for message in messages if message["role"] == "tool"]
    for call, result in zip(calls, results, strict=False):
        result |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
    return messages if calls else None


def _system_role(messages: list[Message]) -> list[Message] | None:
    developers = [message for message in messages if message["role"] == "developer"]
    for message in developers:
        message["role"] = "system"
    return messages if developers else None


def _system_in_question(messages: list[Message]) -> list[Message] | None:
    if messages[0]["role"] not in ("system", "developer"):
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def with_ids_of(messages: list[Message], text: str, spelled: str) -> tuple[list[Message], str]:
    """The same with the ids that the engine made, where `spelled` differs in nothing else."""
    names = dict.fromkeys(re.findall(rf"{MADE}\d", text))
    if not names:
        return messages, text
    pattern = re.escape(text)
    for name in names:
        pattern = pattern.replace(name, rf"(?P<{name}>[\w.:-]+?)", 1).replace(name, f"(?P={name})")
        pattern = pattern.replace(f"(?P<(?P={name})>", f"(?P<{name}>")
    match = re.match(pattern, spelled)
    for name in names if match else ():
        text = text.replace(name, match[name])
        messages = json.loads(json.dumps(messages).replace(name, match[name]))
    return messages, text


def _thoughts_moved(conversation: Conversation) -> Iterator[list[Message]]:
    """What is thought, under the key that the template reads or in front of the content, wherever the data has it."""
    places = ("reasoning_content", "reasoning", "thinking", "<think>\n", "")
    for place in places:
        messages = copy.deepcopy(conversation.messages)
        for message in messages:
            thought, end, text = message["content"].partition("</think>")
            thought = thought.removeprefix("<think>").strip("\n") if end else message.get("reasoning_content")
            if message["role"] != "assistant" or not thought:
                continue
            text = text.lstrip("\n") if end else message["content"]
            message.pop("reasoning_content", None)
            if place.isalpha() or "_" in place:
                message |= {place: thought, "content": text}
            else:  # a template that opens the thought itself wants it without its beginning
                message["content"] = f"{place}{thought}\n</think>\n\n{text}"
        if messages != conversation.messages:
            yield messages


def _parts(messages: list[Message]) -> list[Message]:
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def sound(text: str, conversation: Conversation) -> bool:
    """Every call is written, its arguments neither as Python's repr nor as JSON
    in JSON, and something of each answer."""
    marks = [mark for mark in conversation.marks if mark.kind in TRAINED_KINDS]
    calls = [mark for mark in marks if mark.kind == "argument"]
    for mark in calls:
        for begin, _ in places(text, mark.word):
            if "'place': " in text[begin - 12 : begin] or '\\"place\\"' in text[begin - 16 : begin]:
                return False
    written = {mark.message for mark in marks if mark.word in text}
    return all(mark.word in text for mark in calls) and written == {mark.message for mark in marks}


def places(text: str, word: str) -> Iterator[tuple[int, int]]:
    """Where a word begins and ends, each time that it is written."""
    at = text.find(word)
    while at >= 0:
        yield at, at + len(word)
        at = text.find(word, at + 1)


@dataclass
class Reading:
    """A conversation in one of its spellings, and the template's rendering of it."""

    facts: Facts
    conversation: Conversation
    messages: list[Message]
    text: str
    _renderings: dict[tuple[int, bool], str | None] = field(default_factory=dict)

    @property
    def shift(self) -> int:
        """How many messages fewer these are than the conversation's: a system message that stands in the question."""
        return len(self.conversation.messages) - len(self.messages)

    def render(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """The first `count` messages."""
        if (count, add_generation_prompt) not in self._renderings:
            messages, conversation = self.messages[:count], self.conversation
            text = self.facts.render(messages, conversation.tools, add_generation_prompt, conversation.forged)
            self._renderings[count, add_generation_prompt] = text
        return self._renderings[count, add_generation_prompt]

    def words_of(self, message: int, text: str | None = None) -> list[tuple[int, int]]:
        """The places of an answer's words."""
        return sorted(
            place
            for mark in self.conversation.marks
            if mark.message == message + self.shift and mark.kind in TRAINED_KINDS
            for place in places(self.text if text is None else text, mark.word)
        )

    def words_around(self, message: int) -> Iterator[tuple[int, int, int, str]]:
        """The words of other messages: which message it is, begin, end, and the word."""
        for mark in self.conversation.marks:
            if mark.message > -1 and mark.kind in TRAINED_KINDS | FOREIGN_KINDS:
                at = max(mark.message - self.shift, 0)
                if at != message:
                    yield from ((at, *place, mark.word) for place in places(self.text, mark.word))

    def expected(self, added: str) -> Iterator[Expected]:
        """One for each answer that is rendered. `added`: what the engine put behind the rendering."""
        behind = 0
        for at, message in enumerate(self.messages):
            if message["role"] == "assistant" and (start := self._start(at, behind)):
                answer = self._ended(at, start, added)
                behind = answer.ends[0][1] if answer.ends else start[0]
                yield answer

    def _ended(self, at: int, start: tuple[int, int], added: str) -> Expected:
        facts, words = self.facts, self.words_of(at)
        core = words[-1][1] if words else start[1]
        later = [begin for message, begin, _, _ in self.words_around(at) if message > at and begin >= core]
        followed = self.text[core : min(later)] if later else None
        alone = self._alone(at, core)
        behind = alone if followed is None else followed
        units, closing = facts.ends_in(alone, followed), facts.special_in(behind)
        if not words:  # the answer's own frame is among what follows
            behind = self.text[core:] if followed is None else followed
            units, closing = [], [unit for unit in facts.units(behind) if unit.special]
        # Generation stops at the first one that ends answers, and another right behind it does no harm.
        units += [unit for unit in closing if unit.text in facts.enders][:1]
        units += self._right_behind(units, behind)
        ends = [(core + unit.end - len(unit.text), core + unit.end) for unit in units]
        if followed is None and not ends and added:
            ends = [(len(self.text), len(self.text + added))]
        word = words[0][0] if words else None
        adjacent = bool(later) and self.messages[at + 1]["role"] == "assistant"
        return Expected(at + self.shift, *start, ends, word, merged=adjacent and not ends)

    def _right_behind(self, units: list[Unit], followed: str) -> list[Unit]:
        """Another token that ends answers, behind the one that does."""
        end = max((unit.end for unit in units), default=None)
        rest = [unit for unit in self.facts.units(followed) if end is not None and unit.end > end][:1]
        return [unit for unit in rest if unit.special and unit.text in self.facts.enders]

    def _alone(self, at: int, core: int) -> str:
        """What follows an answer where the conversation ends with it."""
        if at == len(self.messages) - 1:
            return self.text[core:]
        cut = self.render(at + 1)
        if cut is None:
            return self.facts.at_the_end
        words = self.words_of(at, cut)
        if words:
            return cut[words[-1][1] :]
        before = self.render(at, add_generation_prompt=True)
        return cut[len(before) :] if before and cut.startswith(before) else self.facts.at_the_end

    def _start(self, at: int, behind: int) -> tuple[int, int] | None:
        """The first and the last place where an answer may begin; None if the template leaves it out.

        `behind`: where the answer before it ends.
        """
        words = self.words_of(at)
        word = words[0][0] if words else None
        before = self.render(at, add_generation_prompt=True) if at else None
        last, last_word = max(
            (
                (end, text)
                for message, _, end, text in self.words_around(at)
                if message < at and (word is None or end <= word)
            ),
            default=(0, ""),
        )
        last = max(last, behind)
        behind_answer = at and self.messages[at - 1]["role"] == "assistant"  # where nothing is generated
        if before is None or (behind_answer and word is not None):
            return None if word is None else (last, word)
        opened = len(before) > len(self.render(at) or "")
        if self.text.startswith(before):
            if opened or word is None:
                return self._exact(len(before))
            return max(len(before), behind), word  # nothing is opened here for a model to go on from
        tail = before.rpartition(last_word)[2] if last_word and last_word in before else before
        begin = self.text.rfind(last_word, 0, word) + len(last_word) if last_word else 0
        here = self.text[begin:word]
        if opened and here.startswith(tail):
            return self._exact(begin + len(tail))
        like = self._like(tail, here, begin, word is not None) if opened or word is None else None
        return like or ((last, word) if word is not None else self._written_blank(at, last))

    def _written_blank(self, at: int, last: int) -> tuple[int, int] | None:
        """An answer in which nothing is said begins right behind the message before, if anything is written for it."""
        others = [*self.messages[:at], *self.messages[at + 1 :]]
        without = self.facts.render(others, self.conversation.tools, forged=self.conversation.forged)
        return None if without in (None, self.text) else (last, last)

    def _exact(self, start: int) -> tuple[int, int]:
        """A template that marks what is to be trained may count what the model writes first as the answer's."""
        if not self.facts.marks:
            return start, start
        units = self._without_own(self.facts.units(self.text[:start]))
        return (units[-1].end if units else 0), start

    def _like(self, tail: str, here: str, begin: int, bounded: bool) -> tuple[int, int] | None:
        """Where the generation prompt and what is written instead of it part, blanks left aside; or before that, where
        what opens every answer ends, since the rest of the prompt is then the model's own to write. `bounded`: `here`
        ends with the answer's first word."""
        _, shared = self.facts.shared(tail, here)
        if self._special_in(tail) and not self._special_in(here[:shared]):
            shared = 0
        if not shared and self.facts.units(tail):
            return None
        units, opening = self._without_own(self.facts.units(here[:shared])), self.facts.opening
        ends = [
            unit.end
            for at, unit in enumerate(units)
            if opening and [each.text for each in units[: at + 1]][-len(opening) :] == opening
        ]
        # A header of its own in the history (Motif): its end will do as well, since the prompt writes that token too.
        prompted = {unit.text for unit in self.facts.units(tail) if unit.special}
        headers = [unit.end for unit in self.facts.units(here) if bounded and unit.text in prompted]
        if headers and tail.rstrip().endswith(here[headers[-1] :].strip()):
            headers.append(len(here))  # and all of it, where the prompt ends with the same
        shared = max([shared, *headers])
        blanks = len(here[shared:]) - len(here[shared:].lstrip())
        first = ends[-1] if ends else units[-1].end if units else 0
        return begin + first, begin + shared + blanks

    def _special_in(self, text: str) -> bool:
        return any(unit.special for unit in self.facts.units(text))

    def _without_own(self, units: list[Unit]) -> list[Unit]:
        """Without what stands at the end that a model may write itself, such as <think>."""
        while units and len(units[-1].text) > 1 and not units[-1].special:
            units = units[:-1]
        return units
