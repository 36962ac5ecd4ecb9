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

from engine.core.reasoning import reasoning_marks
from engine.worker.templates.chat_template import any_of, common_prefix_length, control_tokens, render

ToolCall = dict[str, Any]  # {"name", "arguments": object}
Tools = Sequence[Mapping[str, Any]]
# No template writes these.
NAME, NAME_2, KEY, VALUE, KEY_2, VALUE_2, QUESTION, ANSWER = map(chr, range(0xE000, 0xE008))
ARGUMENTS = {KEY: VALUE, KEY_2: VALUE_2}
REASONING_END = "</think>"  # ends the reasoning
MAX_NAME_CHARACTERS = 64  # as OpenAI allows
# How gpt-oss calls a tool, in the header of a message; its template writes the name before the channel.
CHANNEL_CALL = (
    r"(?:<\|start\|>\w+)?<\|channel\|>\w+\s+to=functions\."
    rf"(?P<name>[\w-]{{1,{MAX_NAME_CHARACTERS}}})[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>\s*"
)
# What a form must be able to read in its template's own output, otherwise it is rejected.
PROBE_ARGUMENTS = {"text": "two words", "number": 7}
PYTHON_LITERALS = {"True": True, "False": False, "None": None}  # some templates write values like Python


@dataclass(frozen=True)
class JsonArguments:
    """The arguments of a call as one JSON object."""

    def read(self, text: str, at: int, texts: Set[str]) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at `at`, and where they end; None if they are incomplete. Those in `texts` are
        texts."""
        try:
            arguments, ends = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        return (arguments, ends) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class ElementArguments:
    """Separately written arguments of a call (Qwen's <parameter=city>Rome</parameter>), with the text `closing` them.

    A template writes spaces `before` and `behind` a value that are not part of it.
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
    """How a template writes calls: `first` and `further` match the text around their names, up to the beginning of the
    arguments. A forced call continues from `opened`, which is None if the generation prompt begins an answer
    differently from one with a call, and from `named` after a name."""

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
        except Exception:  # a template is a program and may reject tools in any way
            return None

    def parse_tool_calls(self, text: str, tools: Tools = ()) -> tuple[str, list[ToolCall]]:
        """The text before the calls, and the calls. Everything is text if what looks like a call is not one.

        `tools` determine which arguments are texts, if that cannot be seen from how they are written.
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
        """The text that has to be written in advance so that the tool with this name is called; None if that is
        unknown."""
        if not self.opened or not name:
            return self.opened
        opened, named = self.opened, self.named
        return CallPrefix(opened.prompt + name + named.prompt, opened.read + name + named.read)

    def length_before_calls(self, text: str, before: int = 0) -> int:
        """How many characters of an answer in progress are certainly not part of a call. `before`: the number at the
        previous check."""
        # Partial: what is at the end may become a match when more is written.
        match = self.first.search(text, max(before, _reasoning_end(text)), partial=True)
        return match.start() if match else len(text)


class _AfterName(NamedTuple):
    """The text after the name of a call: the `text` up to the arguments and a pattern of it, how these are read, and
    where they end."""

    text: str
    between: str
    arguments: JsonArguments | ElementArguments
    ends: int


class _FormatProbe:
    """What a template writes for calls, and how to read it. Anything may be raised if it shows no form."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str):
        self.tokenizer, self.template, self.encoded = tokenizer, template, False
        control = control_tokens(tokenizer, template)
        visible = reasoning_marks(control)
        self.channels = "<|channel|>" in visible
        self.special = any_of([token for token in control if control[token] and token not in visible])
        self.prompt, _ = render(
            tokenizer, template, [{"role": "user", "content": QUESTION}], add_generation_prompt=True
        )
        self.prompt = self.prompt.partition(QUESTION)[2]
        # The text around any answer.
        self.opens, _, self.ends = self.text(content=ANSWER).partition(ANSWER)
        try:
            self.text((NAME, {KEY: VALUE}))
        except Exception:  # some templates expect the arguments as JSON text
            self.encoded = True

    def read(self, text: str) -> str:
        """The text as it is in an answer: without its control tokens, except the marks of reasoning."""
        return self.special.sub("", text)

    def text(self, *calls: tuple[str, Any], content: str = "") -> str:
        """What follows a question with this answer."""
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
        any_call = rf"(?:{call}|{CHANNEL_CALL})" if self.channels else call
        form = ToolCallFormat(
            first=regex.compile(_optional_pattern(read.removesuffix(each)) + any_call),
            further=regex.compile(r"\s*" + _optional_pattern(joined) + any_call),
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
        """What follows the generation prompt in an answer that begins with a call: up to its name it is `whole`, and
        `before` is the part that other answers do not have. Thinking opened by the prompt is closed."""
        if whole.startswith(self.prompt):
            return CallPrefix(whole[len(self.prompt) :], self.read(before))
        if self.prompt.rstrip().endswith("<think>"):
            return CallPrefix(f"{REASONING_END}\n\n{before.lstrip()}", self.read(before.lstrip()))
        return None

    def several(self, before: str, ends: int) -> tuple[str, str]:
        """What identifies each call: the text `before` the first (Mistral's are a list, so only the first has the
        bracket), and the text between two. `ends`: where arguments end, after the name."""
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
        """None if the arguments are not a JSON object."""
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
        """If every argument is written separately: what opens one, separates its name and value, and closes it."""
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
        )  # after the name, whatever follows
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


# JSON has neither NaN nor Infinity: a tool could not read them, nor a number that overflows to one.
DECODER = json.JSONDecoder(parse_constant=_finite_number, parse_float=_finite_number)


def _parse_value(written: str) -> Any:
    """A value written as in JSON or Python; anything else is a text."""
    try:
        return PYTHON_LITERALS[written] if written in PYTHON_LITERALS else DECODER.decode(written)
    except (ValueError, RecursionError):
        return written


def _text_arguments_by_tool(tools: Tools) -> dict[str, Set[str]]:
    """Name of each tool → its arguments that are texts according to its description. What users write may have any
    shape."""
    functions = [tool.get("function") for tool in tools]
    named = [
        function for function in functions if isinstance(function, Mapping) and isinstance(function.get("name"), str)
    ]
    return {function["name"]: _text_arguments(function.get("parameters")) for function in named}


def _text_arguments(parameters: Any) -> Set[str]:
    known = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {key for key, schema in known.items() if _may_be_text(schema)} if isinstance(known, Mapping) else set()


def _may_be_text(schema: Any) -> bool:
    """Whether a value with this description may be a text."""

    def either(word: str, schema: Any) -> list[Any]:
        values = schema.get(word) if isinstance(schema, Mapping) else None
        return values if isinstance(values, list) else [values]

    kinds = [schema, *either("anyOf", schema)]
    return any(
        "string" in either("type", kind) or any(isinstance(value, str) for value in either("enum", kind))
        for kind in kinds
    )


def _reasoning_end(text: str) -> int:
    """Where the reasoning ends, if there is any: calls inside reasoning do not count."""
    return text.rfind(REASONING_END) + len(REASONING_END) if REASONING_END in text else 0


def _optional_pattern(text: str) -> str:
    return rf"(?:{_spaced_pattern(text)}\s*)?" if text.strip() else ""


def _spaced_pattern(text: str) -> str:
    """A pattern for `text` that accepts any amount of space between its words."""
    return r"\s*".join(map(regex.escape, text.split()))
