"""Change one entry of the text of quotas.yaml and leave every other line as it is, comments too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node

Entry = Mapping[str, float | None]


def with_entry(text: str, path: Sequence[str], entry: Entry) -> str | None:
    """The text with `entry` at `path`, ("default",) or ("users", NAME); None if a comment would be lost, or the text is
    written in a way that is not understood. The caller has to check what the result says. Raises YAMLError."""
    node = yaml.compose(text, yaml.SafeLoader)
    if node is None:  # empty, or comments alone
        return f"{text.rstrip()}\n{_lines(path, entry)}\n".lstrip("\n")
    for depth, name in enumerate(path):
        if not isinstance(node, MappingNode):
            return None
        pair = next(((key, value) for key, value in node.value if key.value == name), None)
        if pair is None:
            return _inserted(text, node, path[depth:], entry)
        key, node = pair
        rest = path[depth + 1 :]
        if not rest or not (isinstance(node, MappingNode) and node.value):
            begin, end = key.end_mark.index, _end(node)
            return None if "#" in text[begin:end] else f"{text[:begin]}: {_flow(rest, entry)}{text[end:]}"
    return None


def _inserted(text: str, node: MappingNode, path: Sequence[str], entry: Entry) -> str:
    """The text with a new key in a mapping that has others."""
    if node.flow_style:
        at = node.start_mark.index + 1
        return f"{text[:at]}{_name(path[0])}: {_flow(path[1:], entry)}, {text[at:]}"
    end_of_line = text.find("\n", _end(node))
    at = len(text) if end_of_line < 0 else end_of_line
    indent = " " * node.start_mark.column
    return f"{text[:at]}\n{indent}{_lines(path, entry)}{text[at:]}"


def _end(node: Node) -> int:
    """Where a node's text ends: that of a block would reach to the next token, past comments."""
    if not isinstance(node, CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, MappingNode) else last)


def _lines(path: Sequence[str], entry: Entry) -> str:
    """A new entry: a line, below that of `users` if that is new, too."""
    return "\n".join(f"{'  ' * depth}{_name(name)}:" for depth, name in enumerate(path)) + f" {_flow((), entry)}"


def _flow(path: Sequence[str], entry: Entry) -> str:
    """The entry in one line, inside the keys of `path`."""
    text = "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in entry.items()) + "}"
    for name in reversed(path):
        text = f"{{{_name(name)}: {text}}}"
    return text


def _name(name: str) -> str:
    """A key that is read as this very text: the name of a user may look like a number, or be called null."""
    return name if yaml.safe_load(name) == name else json.dumps(name, ensure_ascii=False)
