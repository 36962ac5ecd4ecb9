"""Calls of tools in what a model writes. How its chat template writes them is learned from the template itself, as
`engine.worker.frame` learns where answers end: no list of model families is kept.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from engine.worker.frame import agree, any_of, render

Call = dict[str, Any]  # {"name", "arguments": object}
NAME, NAME_2, KEY, VALUE, ASKED, ANSWERED = map(chr, range(0xE000, 0xE006))  # no template writes these
LONGEST_NAME = 64  # characters, as OpenAI allows


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls whose arguments are JSON. `opening` is what a text with a call in it cannot be without.

    `first` and `further` match what stands around the names of calls, up to where the arguments begin.
    """

    opening: str
    first: re.Pattern[str]
    further: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> CallForm | None:
        """None if the template writes no calls, or writes their arguments otherwise than as a JSON object."""
        for encoded in (False, True):  # some templates want the arguments as an object, some as its JSON
            try:
                return cls._learn(tokenizer, template, encoded)
            except ValueError:
                return None
            except Exception:  # a template is a program of its own, and may refuse tools in any way it likes
                continue
        return None

    @classmethod
    def _learn(cls, tokenizer: PreTrainedTokenizerFast, template: str, encoded: bool) -> CallForm | None:
        special = any_of(tokenizer.all_special_tokens)  # they are no part of an answer's text

        def written(*names: str, content: str = "") -> str:
            arguments: Any = {KEY: VALUE}
            arguments = json.dumps(arguments, ensure_ascii=False) if encoded else arguments
            calls = [
                {
                    "id": f"call0000{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for number, name in enumerate(names)
            ]
            spoken = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
            text, _ = render(tokenizer, template, [{"role": "user", "content": ASKED}, spoken])
            return text.partition(ASKED)[2]

        def around(text: str) -> tuple[str, str, str]:
            """What stands before the first name, between it and its arguments, and behind those. Raises ValueError."""
            before, _, rest = text.partition(NAME)
            begins = rest.rindex("{", 0, rest.index(KEY))
            _, ends = json.JSONDecoder().raw_decode(rest, begins)
            return before, rest[:begins], rest[ends:]

        before, between, _ = around(written(NAME))
        before = before[agree(before, written(content=ANSWERED).partition(ANSWERED)[0]) :]
        each, joined = before, ""
        with contextlib.suppress(Exception):  # Llama's template calls one tool at a time
            joined, told, _ = around(written(NAME, NAME_2))[2].partition(NAME_2)
            if told:  # what each call is told by: Mistral's are a list, so only the first has the bracket
                each = before[len(before) - agree(before[::-1], joined[::-1]) :]
            joined = joined.removesuffix(each) if told else ""
        before, each, between, joined = (special.sub("", text) for text in (before, each, between, joined))
        if not each.strip() or not between.strip():
            return None  # nothing would tell a call, or where its name ends
        name = rf"(?P<name>[^\s\"]{{1,{LONGEST_NAME}}}?)"
        whole = rf"(?:{_loose(before.removesuffix(each))})?\s*{_loose(each)}"
        return cls(
            opening=(before.split() or [""])[0],
            first=re.compile(rf"{whole}\s*{name}\s*{_loose(between)}\s*"),
            further=re.compile(rf"\s*(?:{_loose(joined)})?\s*{_loose(each)}\s*{name}\s*{_loose(between)}\s*"),
        )

    def split(self, text: str) -> tuple[str, list[Call]]:
        """What is said before the calls, and the calls. All of it is said if what looks like a call is none."""
        found = self.first.search(text)
        calls: list[Call] = []
        said, at = found.start() if found else len(text), found
        while at:
            try:
                arguments, ends = json.JSONDecoder().raw_decode(text, at.end())
            except ValueError:
                break
            if not isinstance(arguments, dict):
                break
            calls.append({"name": at["name"], "arguments": arguments})
            at = self.further.match(text, ends)
        return (text[:said], calls) if calls else (text, [])

    def held(self, text: str) -> int:
        """How much of an answer that is being written is certainly no part of a call, in characters."""
        found = text.find(self.opening)
        if found >= 0:
            return found
        return next(
            (len(text) - n for n in range(min(len(self.opening) - 1, len(text)), 0, -1) if text.endswith(self.opening[:n])),
            len(text),
        )  # fmt: skip


def _loose(text: str) -> str:
    """A pattern for `text` that does not mind how much space its words are apart."""
    return r"\s*".join(map(re.escape, text.split()))
