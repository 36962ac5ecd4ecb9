"""Calls of tools in what a model writes. How its chat template writes them is learned from the template itself, as
`engine.worker.frame` learns where answers end: no list of model families is kept.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from engine.worker.frame import agree, any_of, control_tokens, render

Call = dict[str, Any]  # {"name", "arguments": object}
Tools = Sequence[Mapping[str, Any]]
# No template writes these.
NAME, NAME_2, KEY, VALUE, KEY_2, VALUE_2, ASKED, ANSWERED = map(chr, range(0xE000, 0xE008))
LONGEST_NAME = 64  # characters, as OpenAI allows
# What a form has to read as its template writes it, or it is none.
PROOF = {"text": "two words", "number": 7}
PYTHON = {"True": True, "False": False, "None": None}  # some templates write values as Python does


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls. `opening` is what a text with a call in it cannot be without.

    `first` and `further` match what stands around the names of calls, up to where the arguments begin. These are a JSON
    object or, where there is an `argument` to match, a list of them (Qwen's <parameter=city>Rome</parameter>) and
    what is `closing` it.
    """

    opening: str
    first: re.Pattern[str]
    further: re.Pattern[str]
    argument: re.Pattern[str] | None
    closing: re.Pattern[str] | None
    around: tuple[str, str] = (
        "",
        "",
    )  # the spaces that a template writes before and behind such an argument's value

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> CallForm | None:
        """None if the template writes no calls, or in a form that cannot be learned."""
        with contextlib.suppress(
            Exception
        ):  # a template is a program of its own, and may refuse tools as it likes
            return _Written(tokenizer, template).form()
        return None

    def split(self, text: str, tools: Tools = ()) -> tuple[str, list[Call]]:
        """What is said before the calls, and the calls. All of it is said if what looks like a call is none.

        `tools` tell which arguments are texts, where that is not to be seen from how they are written.
        """
        known = {tool["function"].get("name") for tool in tools if isinstance(tool.get("function"), Mapping)}
        calls: list[Call] = []
        said, at = len(text), self.first.search(text, _thought(text))
        while at:
            read = self._arguments(text, at.end(), _texts(tools, at["name"]))
            ends = at.end()
            if read and (not known or at["name"] in known):
                said = said if calls else at.start()
                arguments, ends = read
                calls.append({"name": at["name"], "arguments": arguments})
                at = self.further.match(text, ends) or self.first.search(text, ends)
            else:
                at = self.first.search(text, ends)
        return (text[:said].rstrip(), calls) if calls else (text, [])

    def held(self, text: str) -> int:
        """How much of an answer that is being written is certainly no part of a call, in characters."""
        found = text.find(self.opening, _thought(text))
        if found >= 0:
            return found
        return next(
            (len(text) - n for n in range(min(len(self.opening) - 1, len(text)), 0, -1) if text.endswith(self.opening[:n])),
            len(text),
        )  # fmt: skip

    def _arguments(self, text: str, at: int, texts: set[str]) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at `at`, and where they end; None if they are not whole."""
        if self.argument is None or self.closing is None:
            with contextlib.suppress(ValueError, RecursionError):
                arguments, ends = json.JSONDecoder().raw_decode(text, at)
                return (arguments, ends) if isinstance(arguments, dict) else None
            return None
        arguments = {}
        while found := self.argument.match(text, at):
            value, at = found["value"].removeprefix(self.around[0]).removesuffix(self.around[1]), found.end()
            if found["key"] not in texts:
                with contextlib.suppress(ValueError, RecursionError):
                    value = PYTHON[value] if value in PYTHON else json.loads(value)
            arguments[found["key"]] = value
        return (arguments, at) if self.closing.match(text, at) else None


class _Written:
    """What a template writes of calls, and how to read it. Anything may be raised where it shows no form."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str):
        self.tokenizer, self.template, self.encoded = tokenizer, template, False
        control = control_tokens(tokenizer, template)
        self.special = any_of([token for token in control if control[token]])  # no part of an answer's text
        self.around = "", ""
        self.opens, _, self.ends = self.text(content=ANSWERED).partition(
            ANSWERED
        )  # what stands around any answer
        try:
            self.text((NAME, {KEY: VALUE}))
        except Exception:  # some templates want the arguments as their JSON
            self.encoded = True

    def text(self, *calls: tuple[str, Any], content: str = "") -> str:
        """What follows a question that is answered so."""
        called = [
            {
                "id": f"call0000{number}", "type": "function",
                "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False) if self.encoded else given},
            }
            for number, (name, given) in enumerate(calls)
        ]  # fmt: skip
        spoken = {"role": "assistant", "content": content} | ({"tool_calls": called} if called else {})
        text, _ = render(self.tokenizer, self.template, [{"role": "user", "content": ASKED}, spoken])
        return text.partition(ASKED)[2]

    def form(self) -> CallForm:
        given = {KEY: VALUE, KEY_2: VALUE_2}
        before, _, rest = self.text((NAME, given)).partition(NAME)
        before = before[agree(before, self.opens) :]
        between, argument, closing, ends = self.as_json(rest) or self.as_elements(rest)
        each, joined = before, ""
        with contextlib.suppress(Exception):  # Llama's template calls one tool at a time
            several = self.text((NAME, given), (NAME_2, given)).partition(NAME)[2]
            joined, told, _ = several[ends:].partition(NAME_2)
            if told:  # what each call is told by: Mistral's are a list, so only the first has the bracket
                each = before[len(before) - agree(before[::-1], joined[::-1]) :]
            joined = joined.removesuffix(each) if told else ""
        before, each, joined = (self.special.sub("", text) for text in (before, each, joined))
        if not each.strip():
            raise ValueError("nothing tells a call")
        call = rf"{_loose(each)}\s*(?P<name>[^\s\"]{{1,{LONGEST_NAME}}}?)\s*{between}\s*"
        form = CallForm(
            opening=before.split()[0],
            first=re.compile(_maybe(before.removesuffix(each)) + call),
            further=re.compile(r"\s*" + _maybe(joined) + call),
            argument=argument,
            closing=closing,
            around=self.around,
        )
        for wanted in (PROOF, {}):
            written = self.special.sub("", self.text(("name-1", wanted)))
            if form.split(written)[1] != [{"name": "name-1", "arguments": wanted}]:
                raise ValueError("it does not read what the template writes")
        return form

    def as_json(self, rest: str) -> tuple[str, None, None, int] | None:
        """What stands between name and arguments, and where these end, if they are a JSON object."""
        begins = rest.rfind("{", 0, rest.index(KEY))
        try:
            _, ends = json.JSONDecoder().raw_decode(rest, begins)
        except ValueError:
            return None
        between = self.special.sub("", rest[:begins])
        if not between.strip():
            raise ValueError("nothing tells where a name ends")
        return _loose(between), None, None, ends

    def as_elements(self, rest: str) -> tuple[str, re.Pattern[str], re.Pattern[str], int]:
        """The same if every argument is written for itself: what opens one, parts its name and value, and closes it."""
        first, rest_of_all = rest.split(KEY)
        parts, after = rest_of_all.split(VALUE)
        joint, _ = after.split(KEY_2)
        opens = first[len(first) - agree(first[::-1], joint[::-1]) :]
        closes = joint.removesuffix(opens)
        ends = rest.index(VALUE_2) + len(VALUE_2) + len(closes)
        nothing, last = (
            text.removesuffix(self.ends) for text in (self.text((NAME, {})).partition(NAME)[2], rest[ends:])
        )
        self.around = parts[len(parts.rstrip()) :], closes[: len(closes) - len(closes.lstrip())]
        shown = [self.special.sub("", text) for text in (opens, parts, closes, last, nothing)]
        opens, parts, closes, last, nothing = map(_loose, shown)
        if not (opens and parts and closes):
            raise ValueError("nothing tells where an argument begins or ends")
        argument = rf"{opens}\s*(?P<key>\S+?)\s*{parts}(?P<value>.*?){closes}\s*(?={opens}|{last})"
        between, closing = rf"(?={opens}|{nothing})", re.compile(rf"\s*(?:{last}|{nothing})")
        return between, re.compile(argument, re.DOTALL), closing, ends


def _texts(tools: Tools, name: str) -> set[str]:
    """The arguments of a tool that its description says are texts."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            with contextlib.suppress(AttributeError):  # what users write may have any shape
                known = (function.get("parameters") or {}).get("properties") or {}
                return {key for key, told in known.items() if _text(told)}
    return set()


def _text(told: Mapping[str, Any]) -> bool:
    """Whether a value that is so described may be a text."""
    kinds = told.get("type")
    values, others = told.get("enum") or [], told.get("anyOf") or []
    return (
        "string" in (kinds if isinstance(kinds, list) else [kinds])
        or any(isinstance(value, str) for value in values)
        or any(_text(other) for other in others)
    )


def _thought(text: str) -> int:
    """Where the reasoning ends, if there is any: what is only thought of is not called."""
    return text.rfind("</think>") + len("</think>") if "</think>" in text else 0


def _maybe(text: str) -> str:
    return rf"(?:{_loose(text)}\s*)?" if text.strip() else ""


def _loose(text: str) -> str:
    """A pattern for `text` that does not mind how much space its words are apart."""
    return r"\s*".join(map(re.escape, text.split()))
