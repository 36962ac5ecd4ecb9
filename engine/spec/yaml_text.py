"""YAML for specs: 1e-5 is a number; aliases, excessive nesting and excessive length are rejected."""

from __future__ import annotations

import re
from typing import Any

import yaml

from engine.core.problems import Refusal, problem


class _Loader(yaml.CSafeLoader):
    """1e-5 is a number to everybody except YAML 1.1, which requires 1.0e-5."""


class _Dumper(yaml.SafeDumper):
    """Puts a text that looks like 1e-5 in quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
MAX_YAML_CHARACTERS = 1 << 18  # a thousand data sets with long names; ten times that would take seconds
MAX_INTEGER_CHARACTERS = 100  # Python refuses to print one with some thousand digits
MAX_YAML_DEPTH = 40  # nested mappings and lists; libyaml crashes the process at some ten thousand


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_INTEGER_CHARACTERS:
        what = f"a number of {len(node.value):,} characters"
        raise yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(text: str, field: str = "") -> Any:
    """Plain data from YAML, without aliases, since a few lines of them can expand beyond all memory.

    Raises Refusal at `field`: with line and column if the text is not YAML, or if it has more than
    `MAX_YAML_CHARACTERS`.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise Refusal(problem("yaml-too-large", field, size=f"{len(text):,}", limit=f"{MAX_YAML_CHARACTERS:,}"))
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                assert event.start_mark is not None  # the parser knows the position of each event
                code = "yaml-too-deep" if depth > MAX_YAML_DEPTH else "yaml-alias"
                raise Refusal(problem(code, field, line=event.start_mark.line + 1))
        return yaml.load(text, Loader=_Loader)
    # A date that does not exist, a tag that its text does not fit: PyYAML's constructors raise various errors.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        lines = text.splitlines() or [""]
        if line > len(lines):  # the end of the text: something was left open
            line, column = len(lines), len(lines[-1]) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise Refusal(problem("spec-not-yaml", field, line=line, column=column, what=what)) from None


def write_yaml(plain: Any) -> str:
    """YAML that `read_yaml` reads back to the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
