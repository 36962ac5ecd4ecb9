"""Find out what a chat template writes around the contents of a conversation, by running it on contents that record how
they are accessed.

A template is a program that may examine a content: strip it, search it for `</think>`, leave it out if it is empty. So
it is run on strings that answer such questions and record them. For all other contents that give the same answers, the
template writes the same around them: nothing else it does can depend on them. A template that does anything else with a
content (slices it, measures it, converts it to JSON) cannot be traced, and is run for each conversation instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.runtime import Undefined
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

Check = tuple[int, Callable[[str], bool]]  # number of a content, and what has to hold for it

# Filters and tests that examine a list of messages and not their contents, or that do nothing to a string.
HARMLESS_FILTERS = {
    "length", "count", "list", "first", "last", "reverse", "items", "selectattr", "rejectattr", "select", "reject",
    "map", "default", "d", "string", "trim",
}  # fmt: skip
HARMLESS_TESTS = {
    "defined", "undefined", "string", "none", "mapping", "iterable", "boolean", "number", "integer", "float", "true",
    "false", "eq", "equalto", "==", "ne", "!=",
}  # fmt: skip

# What a template may ask about a content, operations that may have no effect on it, and splits with nothing to split.
QUESTIONS = ("__contains__", "startswith", "endswith", "__eq__", "__ne__")
CHANGES = ("strip", "lstrip", "rstrip", "replace")
SPLITS = ("split", "rsplit", "partition", "rpartition")
# What Python itself does with any object, and joining.
HARMLESS_OPERATIONS = {
    "__new__", "__init__", "__str__", "__class__", "__doc__", "__init_subclass__",
    "__subclasshook__", "__getattribute__", "__setattr__", "__delattr__", "__dir__",
    "__add__", "__sizeof__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getstate__",
}  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What the template writes: its own texts and, as numbers, the contents; and when it writes exactly that."""

    parts: tuple[str | int, ...]
    checks: tuple[Check, ...]

    def text(self, contents: Sequence[str]) -> str:
        return "".join(contents[part] if isinstance(part, int) else part for part in self.parts)


def sentinel(number: int) -> str:
    """A content that no template writes, and that any kind of quoting would change."""
    return f"{chr(0xE000 + number)}\"'\\<&é{chr(0xE800 + number)}"


class TemplateTracer:
    """A template, compiled so that it can be run on contents that record how they are accessed.

    `variables` is what it sees besides the messages.
    """

    def __init__(self, template: str, variables: dict[str, Any]):
        self.variables, self.recorder = variables, _TraceRecorder()
        self.template = _traceable_template(template, self.recorder)

    def outline(self, roles: Sequence[str], *, add_generation_prompt: bool = False) -> Outline | None:
        """The outline of a conversation with these speakers, one message each; None if there is none.

        Whatever the template raises is raised.
        """
        recorder = self.recorder.again()
        messages = [
            {"role": role, "content": recorder.content(sentinel(number), number)} for number, role in enumerate(roles)
        ]
        try:
            written = self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception:
            if recorder.too_much:
                return None
            raise
        if recorder.too_much:
            return None
        number_of = {sentinel(number): number for number in range(len(roles))}
        split = re.split("(" + "|".join(map(re.escape, number_of)) + ")", str.__str__(written))
        parts = tuple(number_of.get(part, part) for part in split if part)
        leftover = re.compile("[\ue000-\uefff]")
        if any(isinstance(part, str) and leftover.search(part) for part in parts):
            return None  # a content was changed on its way
        return Outline(parts, tuple(recorder.checks.values()))


class _TraceRecorder:
    """What a template asked about the contents of one conversation. `too_much`: something only the content itself could
    answer."""

    def __init__(self) -> None:
        self.checks: dict[tuple[Any, ...], Check] = {}
        self.too_much = False
        self.spliced, self.content = _recording_types(self)

    def again(self) -> _TraceRecorder:
        self.checks.clear()
        self.too_much = False
        return self

    def note(self, number: int, question: tuple[Any, ...], check: Callable[[str], bool]) -> None:
        self.checks[number, *question] = number, check

    def refuse(self) -> NoReturn:
        # Also raised, but a template may catch exceptions; the mark stays.
        self.too_much = True
        raise TypeError("only the content itself could answer this")


def _recording_types(recorder: _TraceRecorder) -> tuple[type, type]:
    """The types of texts with contents in them, and of contents, whose accesses `recorder` records."""

    class Spliced(str):
        """A text with a content in it. It may be joined and written, nothing else."""

        __slots__ = ()

        def __str__(self) -> str:
            return self

        def __add__(self, other: str) -> str:
            return Spliced(str.__add__(self, other))

        def __radd__(self, other: str) -> str:
            return Spliced(other + str.__str__(self)) if type(other) is str else recorder.refuse()

    class Content(Spliced):
        """A content on its own, which may also be stripped and searched."""

        number: int

        def __new__(cls, text: str, number: int) -> Content:
            made = str.__new__(cls, text)
            made.number = number
            return made

        def __bool__(self) -> bool:
            recorder.note(self.number, (), bool)
            return True

    for name in {*dir(str), "__rmod__", "__bool__", "__int__"} - HARMLESS_OPERATIONS:
        setattr(Spliced, name, lambda *_, **__: recorder.refuse())
    for names, answering in ((QUESTIONS, _question), (CHANGES, _unchanged), (SPLITS, _unsplit)):
        for name in names:
            setattr(Content, name, answering(name, recorder))
    return Spliced, Content


def _question(name: str, recorder: _TraceRecorder) -> Callable[..., bool]:
    """A yes or no, which another content has to answer in the same way."""
    ask = getattr(str, name)

    def answer(self: Any, *arguments: Any) -> bool:
        if any(isinstance(argument, recorder.spliced) for argument in arguments):
            recorder.refuse()
        result = ask(self, *arguments)
        if result is not NotImplemented:
            recorder.note(self.number, (name, arguments), lambda text: ask(text, *arguments) == result)
        return result

    return answer


def _unchanged(name: str, recorder: _TraceRecorder) -> Callable[..., str]:
    """A change without effect: another content has to be unaffected by it, too."""
    change = getattr(str, name)

    def answer(self: Any, *arguments: Any) -> str:
        if change(self, *arguments) != str.__str__(self):
            recorder.refuse()
        recorder.note(self.number, (name, arguments), lambda text: change(text, *arguments) == text)
        return self

    return answer


def _unsplit(name: str, recorder: _TraceRecorder) -> Callable[..., Any]:
    """A split at something that does not occur, and must not occur in another content either."""

    def answer(self: Any, mark: str | None = None, *_: Any) -> Any:
        if type(mark) is not str or not mark or str.__contains__(self, mark):
            recorder.refuse()
        recorder.note(self.number, (name, mark), lambda text: mark not in text)
        return {"partition": (self, "", ""), "rpartition": ("", "", self)}.get(name, [self])

    return answer


class _ExposeOperators(NodeTransformer):
    """Rewrites what Jinja does in C, invisibly: `a ~ b`, and `a in "text"`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("spliced"), node.nodes, [], None, None)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = nodes.Call(nodes.EnvironmentAttribute("searched"), [operand.expr], [], None, None)
        return node


def _traceable_template(template: str, recorder: _TraceRecorder) -> Any:
    """The template compiled as in transformers, but so that every use of a content is seen."""
    environment = _compile_jinja_template(template).environment.overlay()

    def spliced(parts: Sequence[Any]) -> str:
        parts = [part for part in map(str, parts) if str.__len__(part)]
        if len(parts) == 1:
            return parts[0]
        whole = "".join(parts)
        traced = any(isinstance(part, recorder.spliced) for part in parts)
        return recorder.spliced(whole) if traced else whole

    class Searched(str):
        """A text in which something is searched; unlike a content, it has no other way of knowing."""

        __slots__ = ()

        def __contains__(self, text: Any) -> bool:
            return recorder.refuse() if isinstance(text, recorder.spliced) else str.__contains__(self, text)

    environment.concat = spliced
    environment.spliced = lambda *parts: spliced(parts)
    environment.searched = lambda where: Searched(where) if type(where) is str else where
    environment.filters = {
        name: _guarded(name, function, HARMLESS_FILTERS, recorder) for name, function in environment.filters.items()
    }
    environment.tests = {
        name: _guarded(name, function, HARMLESS_TESTS, recorder) for name, function in environment.tests.items()
    }
    environment.filters["trim"] = lambda text, chars=None: str(text).strip(chars)
    environment.filters["string"] = lambda text: text if isinstance(text, str) else str(text)
    for name in ("iterable", "sequence"):  # which a string is
        plain = environment.tests[name]
        environment.tests[name] = lambda value, plain=plain: isinstance(value, str) or plain(value)
    tree = _ExposeOperators().visit(environment.parse(template))
    tree.set_environment(environment)
    return environment.from_string(tree)


def _guarded(
    name: str, function: Callable[..., Any], harmless: set[str], recorder: _TraceRecorder
) -> Callable[..., Any]:
    """A filter or test that must not be given a content, nor anything that contains one, unless it is harmless."""
    if name in harmless:
        if name not in (
            "length",
            "count",
            "list",
            "first",
            "last",
            "reverse",
            "items",
            "map",
            "select",
            "reject",
        ):
            return function

        @wraps(function)
        def on_lists(*arguments: Any, **keywords: Any) -> Any:
            if any(isinstance(argument, recorder.spliced) for argument in arguments):
                recorder.refuse()
            return function(*arguments, **keywords)

        return on_lists

    @wraps(function)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        if any(_holds_content(argument, recorder) for argument in (*arguments, *keywords.values())):
            recorder.refuse()
        return function(*arguments, **keywords)

    return watched


def _holds_content(value: Any, recorder: _TraceRecorder) -> bool:
    if isinstance(value, Undefined):
        return False
    if isinstance(value, dict):
        return any(_holds_content(part, recorder) for part in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return any(_holds_content(part, recorder) for part in value)
    return isinstance(value, recorder.spliced)
