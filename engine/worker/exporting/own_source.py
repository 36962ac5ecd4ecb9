"""The source text of functions and classes of ours with everything of ours that they use, and the imports of the rest:
so that they can stand in a file of their own."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

OURS = "engine"


class OwnSource:
    """`definitions`: name → source text, in an order in which each finds what it needs. `imports`: name → where it
    comes from, as (module, its name there), with "" for the module itself."""

    def __init__(self) -> None:
        self.definitions: dict[str, str] = {}
        self.imports: dict[str, tuple[str, str]] = {}

    def add(self, thing: Any) -> str:
        """Add a function or class; returns its name."""
        self._add_definition(sys.modules[thing.__module__], thing.__name__)
        return thing.__name__

    def _add_definition(self, module: ModuleType, name: str) -> None:
        if name in self.definitions:
            return
        node = _definitions(module)[name]
        if any(_text(module, node) == text for text in self.definitions.values()):
            return  # several names are assigned at once
        self.definitions[name] = ""  # it may refer to itself
        for used in names_of(node, annotations=False):
            self._add_used(module, used)
        for used in names_of(node):
            if used in _definitions(module):
                self._add_definition(module, used)
            elif not _is_ours(_imports(module).get(used, (OURS, ""))[0]):
                self.imports[used] = _imports(module)[used]
        del self.definitions[name]
        self.definitions[name] = _text(module, node)

    def _add_used(self, module: ModuleType, name: str) -> None:
        """Add what a name means in a module, if that is defined by us."""
        if name in _definitions(module):
            self._add_definition(module, name)
        elif (source := _imports(module).get(name)) and _is_ours(source[0]):
            self._add_definition(sys.modules[source[0]], source[1])


def names_of(node: ast.AST, *, annotations: bool = True) -> set[str]:
    """The names that code reads, without those of builtins; with or without those that only annotations mention."""
    return {
        part.id
        for part in _walk(node, annotations)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and not hasattr(builtins, part.id)
    }


def _walk(node: ast.AST, annotations: bool) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") and not annotations:
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _walk(part, annotations)


def import_lines(imports: dict[str, tuple[str, str]]) -> str:
    """Import statements, the standard library's first, in the usual order."""
    groups: tuple[list[str], list[str]] = ([], [])
    for module in sorted(module for module, original in imports.values() if not original):
        groups[_is_other(module)].append(f"import {module}")
    sources = sorted({module for module, original in imports.values() if original}, key=str.lower)
    for source in sources:
        names = sorted((name for name, place in imports.items() if place == (source, name)), key=_as_sorted)
        line = f"from {source} import {', '.join(names)}"
        wrapped = f"from {source} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        groups[_is_other(source)].append(line if len(line) <= 120 else wrapped)
    return "\n\n".join("\n".join(group) for group in groups if group)


def _as_sorted(name: str) -> tuple[int, str]:
    """Constants first, then classes, then functions, as isort orders them."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def _is_other(module: str) -> bool:
    return module.partition(".")[0] not in sys.stdlib_module_names


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == OURS


@cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


@cache
def _definitions(module: ModuleType) -> dict[str, ast.stmt]:
    """What a module defines at its top: functions, classes and constants."""
    defined: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                defined |= {name.id: node for name in names if isinstance(name, ast.Name)}
    return defined


@cache
def _imports(module: ModuleType) -> dict[str, tuple[str, str]]:
    """What a module imports at its top."""
    imported = {}
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module_name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                imported[alias.asname or alias.name] = (module_name, "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return imported


def _text(module: ModuleType, node: ast.stmt) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    lines = inspect.getsource(module).splitlines()
    return "\n".join(lines[first - 1 : node.end_lineno])
