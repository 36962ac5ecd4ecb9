"""A chat template as a program: what it writes for a conversation, and in which form it accepts one.

There is no list of model families here. In which form the template expects the arguments of a call, its name for
reasoning, the marks that it looks for in an answer: each is determined by rendering a probe and examining the output.
Finding the answers in the output is left to `engine.worker.templates.answer_spans`.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count
from typing import Any

from jinja2 import nodes
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from engine.data.images import IMAGE_MARK
from engine.worker.templates.time_limit import time_limit

Span = tuple[int, int]
Row = Mapping[str, Any]  # {"messages": [...], "tools": [...] | None}
Message = dict[str, Any]

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own marks around what is to be trained
REASONING = "reasoning_content"  # the key of reasoning in canonical rows
REASONING_KEYS = (REASONING, "reasoning", "thinking")  # its names in templates
INLINE_REASONING = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
PLAIN_WORD = re.compile(r"\w*")
SYNTHETIC_CALL_ID = re.compile(r"call\d{5}|functions\..+:\d+")  # of a call that has none in the data
CALL_ID_LENGTH = 9  # length of a tool call's id: required by Mistral's templates, and accepted by all others
# Private-use characters, which no template writes.
PROBE, PROBE_2, QUESTION = "\ue000", "\ue001", "\ue002"
SEARCH_METHODS = {
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "find",
    "replace",
    "count",
}


class ChatTemplate:
    """One template of a tokenizer. `source` is its jinja text.

    `control`: text of each control token → whether it is special (see `control_tokens`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str):
        self.tokenizer, self.source = tokenizer, source
        # A template may assemble a token from parts, which only its output shows.
        turns = [{"role": role, "content": QUESTION} for role in ("user", "assistant", "user")]
        written = [self._attempt(turns[:end], add_generation_prompt=True) or "" for end in (1, 3)] if source else []
        self.control = control_tokens(tokenizer, "\n".join([source, *written]))
        self.any_control = any_of(self.control)
        self.has_generation_marks = GENERATION_TAG.search(source) is not None

    def render(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises whatever the template raises."""
        messages = with_content_parts(messages) if self.content_in_parts else messages
        return render(self.tokenizer, self.source, messages, tools, add_generation_prompt)[0]

    def generation_marks(self, messages: list[Message], tools: Any = None) -> list[Span]:
        """The character spans of a conversation that the template marks with {% generation %}."""
        if not self.has_generation_marks:
            return []
        messages = with_content_parts(messages) if self.content_in_parts else messages
        return render(self.tokenizer, self.source, messages, tools)[1]

    # ------------------------------------------------------------------------- what it wants to be given

    @cached_property
    def searched(self) -> frozenset[str]:
        """The texts that the template looks for in its input: `'</think>' in content`, `content.split('…')`."""
        tree = _compile_jinja_template(self.source).environment.parse(self.source)
        return frozenset(text for text in _searched_texts(tree) if text.strip())

    @cached_property
    def separators(self) -> re.Pattern[str]:
        """What divides a text into parts that the template may treat differently: what it looks for, and control
        tokens."""
        return any_of({*self.searched, *self.control, "<think>", "</think>", IMAGE_MARK})

    @cached_property
    def content_in_parts(self) -> bool:
        """Whether it accepts a content only as a list of parts, as templates of vision models do."""
        ask = [{"role": "user", "content": PROBE}]
        as_text, as_parts = (self._attempt(messages) or "" for messages in (ask, with_content_parts(ask)))
        return PROBE not in as_text and PROBE in as_parts

    def writes_image(self, token: str) -> bool:
        """Whether it writes `token` for an image."""
        ask = {"role": "user", "content": f"{IMAGE_MARK}{PROBE}", "images": [token]}
        return token in (self._attempt([ask]) or "")

    @cached_property
    def writes_ids(self) -> bool:
        """Whether it mentions the IDs of calls, and so may require them."""
        return re.search(r"\bid\b|tool_call_id", self.source) is not None

    @cached_property
    def writes_names(self) -> bool:
        """Whether it writes the name of a call; in Kimi K2's, the name is part of the ID."""
        text = self._call_probe({"key": PROBE}, "", PROBE_2) or self._call_probe({"key": PROBE}, None, PROBE_2)
        return not text or PROBE_2 in text

    @cached_property
    def null_beside_calls(self) -> bool:
        """Whether a message that contains only calls must have no content at all (null) rather than an empty one."""
        with_empty, with_null = (self._call_probe({"key": PROBE}, content) for content in ("", None))
        return PROBE not in (with_empty or "") and PROBE in (with_null or "")

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether it expects the arguments of a call as JSON text, because it cannot write an object, or not as
        JSON."""
        forms = ({"key": PROBE}, json.dumps({"key": PROBE}, ensure_ascii=False))
        as_object, as_text = (self._call_probe(form, "") or self._call_probe(form, None) for form in forms)
        python_repr = as_object is not None and f"'key': '{PROBE}'" in as_object
        if as_object is not None and PROBE in as_object and not python_repr:
            return False
        return as_text is not None and PROBE in as_text and '\\"key' not in as_text

    def _call_probe(self, arguments: Any, content: str | None, name: str = "f") -> str | None:
        call = {
            "id": "A" * CALL_ID_LENGTH,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        return self._probe({"role": "assistant", "content": content, "tool_calls": [call]})

    @cached_property
    def reasoning_key(self) -> str | None:
        """Its key for the reasoning of a last answer; None if it has none."""
        for key in REASONING_KEYS:
            if key in self.source:
                text = self._probe({"role": "assistant", "content": PROBE_2, key: PROBE})
                if text and PROBE in text:
                    return key
        return None

    @cached_property
    def reads_inline_reasoning(self) -> bool:
        """Whether it looks for <think>…</think> in an answer itself."""
        return any("think>" in text for text in self.searched)

    @cached_property
    def inline_reasoning(self) -> str:
        """How reasoning is written before a content for a template without a key for it: a text with {} for the
        reasoning; empty if the template would leave it out, or duplicate its opening."""
        if self.reads_inline_reasoning:
            for written in ("<think>\n{}\n</think>\n\n", "{}\n</think>\n\n"):
                message = {"role": "assistant", "content": written.format(PROBE) + PROBE_2}
                text = self._probe(message) or ""
                if PROBE in text and text.count("<think>") == text.count("</think>") == 1:
                    return written
        return ""

    def _probe(self, message: Message) -> str | None:
        return self._attempt([{"role": "user", "content": QUESTION}, message])

    def _attempt(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        try:
            return render(self.tokenizer, self.source, messages, add_generation_prompt=add_generation_prompt)[0]
        except Exception:  # a template is a program and may reject anything in any way
            return None

    def adapt(self, row: Row) -> Row:
        """The row in the form that this template accepts: reasoning under its key, arguments as object or text, and an
        ID for each call that has none. The same object if nothing has to be changed."""
        messages = row["messages"]
        if all(len(message) == 2 for message in messages) and not self._splits_inline(messages):
            return row
        adapted = [self._adapted(message) for message in messages]
        return {
            **row,
            "messages": list(_with_ids(adapted, self.writes_names)) if self.writes_ids else adapted,
        }

    def _splits_inline(self, messages: list[Message]) -> bool:
        return any("</think>" in message["content"] for message in messages if message["role"] == "assistant")

    def _adapted(self, message: Message) -> Message:
        if message["role"] == "assistant" and ("</think>" in message["content"] or message.get(REASONING)):
            message = self._with_reasoning(message)
        if not message.get("tool_calls"):
            return message
        calls = [
            {**call, "function": {**call["function"], "arguments": self._arguments(call["function"])}}
            for call in message["tool_calls"]
        ]
        content = None if self.null_beside_calls and not message["content"] else message["content"]
        return {**message, "content": content, "tool_calls": calls}

    def _arguments(self, function: Mapping[str, Any]) -> Any:
        arguments = function.get("arguments", {})
        if self.arguments_as_text and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        return arguments

    def _with_reasoning(self, message: Message) -> Message:
        content, reasoning = message["content"], message.get(REASONING)
        by_key = reasoning is None and self.reasoning_key and not self.reads_inline_reasoning
        if by_key and (inline := INLINE_REASONING.match(content)):
            reasoning, content = inline[1].strip(), content[inline.end() :]
        rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if reasoning is None:
            return message
        if self.reasoning_key:
            return {**rest, "content": content, self.reasoning_key: reasoning}
        if self.inline_reasoning and "</think>" not in content:
            return {**rest, "content": self.inline_reasoning.format(reasoning) + content}
        return {**rest, "content": content, REASONING: reasoning}  # the template has no place for it


def with_content_parts(messages: list[Message]) -> list[Message]:
    """The messages with each content as a list of one part, except for those with images (see `with_image_parts`)."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str) and not message.get("images")
        else message
        for message in messages
    ]


def with_image_parts(messages: list[Message]) -> list[Message]:
    """The messages as expected by templates of vision models: texts and images as parts of a content, in order."""
    if not any("images" in message for message in messages):
        return messages
    made = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "images"}
        if message.get("images"):
            parts: list[dict[str, str]] = []
            for number, text in enumerate(message["content"].split(IMAGE_MARK)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": text}] if text else []
            rest["content"] = parts
        made.append(rest)
    return made


def with_short_ids(messages: list[Message]) -> list[Message]:
    """The messages with each call's ID replaced by nine letters and digits, as some templates require; equal IDs stay
    equal."""

    def short(text: Any) -> str:
        digest = hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).digest()
        letters = string.ascii_letters + string.digits
        return "".join(letters[byte % len(letters)] for byte in digest[:CALL_ID_LENGTH])

    changed = []
    for message in messages:
        calls = [{**call, "id": short(call.get("id"))} for call in message.get("tool_calls") or ()]
        message = {**message, "tool_calls": calls} if calls else message
        answers = message.get("tool_call_id")
        changed.append({**message, "tool_call_id": short(answers)} if answers is not None else message)
    return changed


def _with_ids(messages: list[Message], named: bool) -> Iterator[Message]:
    """Each call with an ID, and each result with the ID and the name of its call, in their order. Unless calls are
    `named` elsewhere, the ID contains the name, as in Kimi K2's format."""
    numbers = count()
    waiting: dict[str, str] = {}  # ID of a call → its name
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [{**call, "id": call.get("id") or _synthetic_call_id(call, next(numbers), named)} for call in calls]
            waiting = {call["id"]: call["function"]["name"] for call in calls}
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            answered = message.get("tool_call_id") or next(iter(waiting), f"call{next(numbers):05d}")
            name = waiting.pop(answered, None)
            message = {**({"name": name} if name else {}), **message, "tool_call_id": answered}
        yield message


def _synthetic_call_id(call: Mapping[str, Any], number: int, named: bool) -> str:
    return f"call{number:05d}" if named else f"functions.{call['function']['name']}:{number}"


def _searched_texts(tree: nodes.Template) -> Iterator[str]:
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            yield from _constants([compare.expr])
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCH_METHODS:
            yield from _constants(call.args)
    for applied in tree.find_all(nodes.Filter):
        if applied.name in ("replace", "split"):
            yield from _constants(applied.args)


def _constants(expressions: Iterable[nodes.Node]) -> Iterator[str]:
    for expression in expressions:
        if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
            yield expression.value


# --------------------------------------------------------------------------------------- small things


def control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> dict[str, bool]:
    """Text of each control token → whether it is special: all special tokens, and the added tokens that the template
    writes.

    Other added tokens are ordinary vocabulary, such as Gemma's runs of spaces and HTML tags; so are plain words, which
    some tokenizers add ("user").
    """
    return {
        token.content: token.special
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not PLAIN_WORD.fullmatch(token.content.strip()))
    }


def texts_in(value: Any) -> str:
    """All texts in a nested value, unchanged, because `repr` shows rare characters as numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "\0".join(f"{texts_in(key)}\0{texts_in(item)}" for key, item in value.items())
    return "\0".join(map(texts_in, value)) if isinstance(value, (list, tuple)) else ""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, preferring the longest."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def render(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[Message],
    tools: Any = None,
    add_generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """The text of one conversation and the character spans that its template marks with {% generation %}. Raises
    whatever the template raises, and RenderTimeout."""
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    with time_limit(template):
        # Annotated as returning a text; it returns the texts, and the spans of each.
        rendered: Any = render_jinja_template(
            conversations=[with_image_parts(messages)],
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=GENERATION_TAG.search(template) is not None,
            **special_tokens,
        )
    texts, marked = rendered
    return texts[0], marked[0] if marked else []


def ids_of_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]) -> list[int]:
    """The ID of each token."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)  # as always for a list
    return ids


def common_prefix_length(a: str, b: str, atoms: re.Pattern[str] | None = None) -> int:
    """Length of the common beginning of `a` and `b`, without cutting an atom in two ("<|end|>" against "<|user|>")."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    occurrences = atoms.finditer if atoms else lambda _: ()
    cut = [m.start() for text in (a, b) for m in occurrences(text) if m.start() < length < m.end()]
    return min([length, *cut])
