"""Tool calls in a model's answer.

How a chat template writes them is determined from the template itself, as `engine.worker.templates.answer_spans`
determines where answers end; there is no list of model families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import regex
from transformers import PreTrainedTokenizerFast

from engine.worker.templates.chat_template import any_of, common_prefix_length, control_tokens, render

ToolCall = dict[str, Any]  # {"name", "arguments": object}
Tools = Sequence[Mapping[str, Any]]
# No template writes these.
NAME, NAME_2, KEY, VALUE, KEY_2, VALUE_2, QUESTION, ANSWER = map(chr, range(0xE000, 0xE008))
ARGUMENTS = {KEY: VALUE, KEY_2: VALUE_2}
REASONING_END = "</think>"  # ends the reasoning
MAX_NAME_CHARACTERS = 64  # as OpenAI allows
# What a form has to read as its template writes it, or it is none.
PROBE_ARGUMENTS = {"text": "two words", "number": 7}
PYTHON_LITERALS = {"True": True, "False": False, "None": None}  # some templates write values as Python does


@dataclass(frozen=True)
class JsonArguments:
    """The arguments of a call as one JSON object."""

    def read(self, text: str, at: int, texts: Set[str]) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at `at`, and where they end; None if they
        are not whole. Those in `texts` are texts."""
        try:
            arguments, ends = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        return (arguments, ends) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class ElementArguments:
    """The arguments of a call each for itself (Qwen's <parameter=city>Rome</parameter>), with what is `closing` them.

    A template writes spaces `before` and `behind` a value that are none of it.
    """

    argument: regex.Pattern[str]
    closing: regex.Pattern[str]
    before: str
    behind: str

    def read(self, text: str, at: int, texts: Set[str]) -> tuple[dict[str, Any], int] | None:
        arguments = {}
        while match := self.argument.match(text, at):
            key, at = match["key"], match.end()
            value = match["value"].removeprefix(self.before).removesuffix(self.behind)
            arguments[key] = value if key in texts else _parse_value(value)
        return (arguments, at) if self.closing.match(text, at) else None


class CallPrefix(NamedTuple):
    """The beginning of an answer that is a call: as a `prompt` ends with it, and as it is `read` in the answer."""

    prompt: str
    read: str


@dataclass(frozen=True)
class ToolCallFormat:
    """How a template writes calls: `first` and `further` match what stands around their names, up to where the
    arguments begin. Who has to call goes on from what is `opened`, which is None where the generation prompt begins an
    answer otherwise than one that calls, and from what is `named` behind a name."""

    first: regex.Pattern[str]
    further: regex.Pattern[str]
    arguments: JsonArguments | ElementArguments
    opened: CallPrefix | None
    named: CallPrefix

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> ToolCallFormat | None:
        """None if the template writes no calls, or in a form that cannot be learned."""
        try:
            return _FormatProbe(tokenizer, template).form()
        except Exception:  # a template is a program of its own, and may refuse tools as it likes
            return None

    def parse_tool_calls(self, text: str, tools: Tools = ()) -> tuple[str, list[ToolCall]]:
        """What is said before the calls, and the calls. All of it is said if what looks like a call is none.

        `tools` tell which arguments are texts, where that is not to be seen from how they are written.
        """
        known = _text_arguments_by_tool(tools)
        calls: list[ToolCall] = []
        text_end, match = len(text), self.first.search(text, _reasoning_end(text))
        while match:
            name, ends = match["name"], match.end()
            read = self.arguments.read(text, ends, known.get(name, frozenset()))
            if read and (not known or name in known):
                text_end = text_end if calls else match.start()
                arguments, ends = read
                calls.append({"name": name, "arguments": arguments})
                match = self.further.match(text, ends) or self.first.search(text, ends)
            else:
                match = self.first.search(text, ends)
        return (text[:text_end].rstrip(), calls) if calls else (text, [])

    def forced_call(self, name: str = "") -> CallPrefix | None:
        """What has to be written already so that a tool is called, the one with this name; None if that is unknown."""
        if not self.opened or not name:
            return self.opened
        opened, named = self.opened, self.named
        return CallPrefix(opened.prompt + name + named.prompt, opened.read + name + named.read)

    def length_before_calls(self, text: str, before: int = 0) -> int:
        """How much of an answer that is being written is certainly no part of a call, in characters. `before`: how
        much was so at the last call."""
        # Partial: what stands at the end may become a match, as more is written.
        match = self.first.search(text, max(before, _reasoning_end(text)), partial=True)
        return match.start() if match else len(text)


class _AfterName(NamedTuple):
    """What stands behind the name of a call: the `text` up to the arguments and
    a pattern of it, how these are read, and where they end."""

    text: str
    between: str
    arguments: JsonArguments | ElementArguments
    ends: int


class _FormatProbe:
    """What a template writes of calls, and how to read it. Anything may be raised where it shows no form."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str):
        self.tokenizer, self.template, self.encoded = tokenizer, template, False
        control = control_tokens(tokenizer, template)
        self.special = any_of([token for token in control if control[token]])
        self.prompt, _ = render(
            tokenizer, template, [{"role": "user", "content": QUESTION}], add_generation_prompt=True
        )
        self.prompt = self.prompt.partition(QUESTION)[2]
        # What stands around any answer.
        self.opens, _, self.ends = self.text(content=ANSWER).partition(ANSWER)
        try:
            self.text((NAME, {KEY: VALUE}))
        except Exception:  # some templates want the arguments as their JSON
            self.encoded = True

    def read(self, text: str) -> str:
        """As it stands in an answer: without its control tokens."""
        return self.special.sub("", text)

    def text(self, *calls: tuple[str, Any], content: str = "") -> str:
        """What follows a question that is answered so."""
        called = [
            {
                "id": f"call0000{number}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": json.dumps(arguments, ensure_ascii=False) if self.encoded else arguments,
                },
            }
            for number, (name, arguments) in enumerate(calls)
        ]
        spoken = {"role": "assistant", "content": content} | ({"tool_calls": called} if called else {})
        text, _ = render(self.tokenizer, self.template, [{"role": "user", "content": QUESTION}, spoken])
        return text.partition(QUESTION)[2]

    def form(self) -> ToolCallFormat:
        whole, _, rest = self.text((NAME, ARGUMENTS)).partition(NAME)
        before = whole[common_prefix_length(whole, self.opens) :]
        behind = self.as_json(rest) or self.as_elements(rest)
        each, joined = self.several(before, behind.ends)
        read, each, joined = map(self.read, (before, each, joined))
        if not each.strip():
            raise ValueError("nothing tells a call")
        call = rf"{_spaced_pattern(each)}\s*(?P<name>[^\s\"]{{1,{MAX_NAME_CHARACTERS}}}?)\s*{behind.between}\s*"
        form = ToolCallFormat(
            first=regex.compile(_optional_pattern(read.removesuffix(each)) + call),
            further=regex.compile(r"\s*" + _optional_pattern(joined) + call),
            arguments=behind.arguments,
            opened=self.opened(whole, before),
            named=CallPrefix(behind.text, self.read(behind.text)),
        )
        for arguments in (PROBE_ARGUMENTS, {}):
            written = self.read(self.text(("name-1", arguments)))
            if form.parse_tool_calls(written)[1] != [{"name": "name-1", "arguments": arguments}]:
                raise ValueError("it does not read what the template writes")
        return form

    def opened(self, whole: str, before: str) -> CallPrefix | None:
        """What follows the generation prompt in an answer that begins with a call: up to its name it is `whole`, of
        which `before` is no part of other answers. A thought that the prompt has opened is closed."""
        if whole.startswith(self.prompt):
            return CallPrefix(whole[len(self.prompt) :], self.read(before))
        if self.prompt.rstrip().endswith("<think>"):
            return CallPrefix(f"{REASONING_END}\n\n{before.lstrip()}", self.read(before.lstrip()))
        return None

    def several(self, before: str, ends: int) -> tuple[str, str]:
        """What each call is told by, of what stands `before` the first (Mistral's are a list, so only the first has the
        bracket), and what stands between two. `ends`: where arguments end, behind the name."""
        try:
            further = self.text((NAME, ARGUMENTS), (NAME_2, ARGUMENTS)).partition(NAME)[2][ends:]
        except Exception:  # Llama's template calls one tool at a time
            return before, ""
        joined, another, _ = further.partition(NAME_2)
        if not another:
            return before, ""
        each = before[len(before) - common_prefix_length(before[::-1], joined[::-1]) :]
        return each, joined.removesuffix(each)

    def as_json(self, rest: str) -> _AfterName | None:
        """None if the arguments are no JSON object."""
        begins = rest.rfind("{", 0, rest.index(KEY))
        try:
            _, ends = DECODER.raw_decode(rest, begins)
        except ValueError:
            return None
        between = _spaced_pattern(self.read(rest[:begins]))
        if not between:
            raise ValueError("nothing tells where a name ends")
        return _AfterName(rest[:begins], between, JsonArguments(), ends)

    def as_elements(self, rest: str) -> _AfterName:
        """If every argument is written for itself: what opens one, parts its name and value, and closes it."""
        first, rest_of_all = rest.split(KEY)
        parts, after = rest_of_all.split(VALUE)
        joint, _ = after.split(KEY_2)
        opens = first[len(first) - common_prefix_length(first[::-1], joint[::-1]) :]
        closes = joint.removesuffix(opens)
        ends = rest.index(VALUE_2) + len(VALUE_2) + len(closes)
        nothing = self.text((NAME, {})).partition(NAME)[2].removesuffix(self.ends)
        last = rest[ends:].removesuffix(self.ends)
        before, behind = parts[len(parts.rstrip()) :], closes[: len(closes) - len(closes.lstrip())]
        text = regex.sub(
            r"<\S*\Z", "", first[: common_prefix_length(first, nothing)]
        )  # behind the name, whatever follows
        opens, parts, closes, last, nothing = (
            _spaced_pattern(self.read(mark)) for mark in (opens, parts, closes, last, nothing)
        )
        if not (opens and parts and closes):
            raise ValueError("nothing tells where an argument begins or ends")
        argument = rf"{opens}\s*(?P<key>\S+?)\s*{parts}(?P<value>.*?){closes}\s*(?={opens}|{last})"
        closing = regex.compile(rf"\s*(?:{last}|{nothing})")
        elements = ElementArguments(regex.compile(argument, regex.DOTALL), closing, before, behind)
        return _AfterName(text, rf"(?={opens}|{nothing})", elements, ends)


def _finite_number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


# JSON has neither NaN nor Infinity: whoever is called could not read them, nor a number that becomes one.
DECODER = json.JSONDecoder(parse_constant=_finite_number, parse_float=_finite_number)


def _parse_value(written: str) -> Any:
    """What is written as JSON or as Python does; anything else is a text."""
    try:
        return PYTHON_LITERALS[written] if written in PYTHON_LITERALS else DECODER.decode(written)
    except (ValueError, RecursionError):
        return written


def _text_arguments_by_tool(tools: Tools) -> dict[str, Set[str]]:
    """Name of each tool → its arguments that its description says are texts. What users write may have any shape."""
    functions = [tool.get("function") for tool in tools]
    named = [
        function for function in functions if isinstance(function, Mapping) and isinstance(function.get("name"), str)
    ]
    return {function["name"]: _text_arguments(function.get("parameters")) for function in named}


def _text_arguments(parameters: Any) -> Set[str]:
    known = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {key for key, schema in known.items() if _may_be_text(schema)} if isinstance(known, Mapping) else set()


def _may_be_text(schema: Any) -> bool:
    """Whether a value that is so described may be a text."""

    def either(word: str, schema: Any) -> list[Any]:
        values = schema.get(word) if isinstance(schema, Mapping) else None
        return values if isinstance(values, list) else [values]

    kinds = [schema, *either("anyOf", schema)]
    return any(
        "string" in either("type", kind) or any(isinstance(value, str) for value in either("enum", kind))
        for kind in kinds
    )


def _reasoning_end(text: str) -> int:
    """Where the reasoning ends, if there is any: what is only thought of is not called."""
    return text.rfind(REASONING_END) + len(REASONING_END) if REASONING_END in text else 0


def _optional_pattern(text: str) -> str:
    return rf"(?:{_spaced_pattern(text)}\s*)?" if text.strip() else ""


def _spaced_pattern(text: str) -> str:
    """A pattern for `text` that does not mind how much space its words are apart."""
    return r"\s*".join(map(regex.escape, text.split()))
