"""Names and sizes that keep the code searchable and readable: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from engine.launch.workspace import PROJECT

FILES = [
    PROJECT / "app.py",
    *sorted((PROJECT / "engine").rglob("*.py")),
    *sorted((PROJECT / "webui").rglob("*.py")),
]
FOLDERS_WITH_CODE = ("engine", "webui", "tests", "bench", "docs")
ALL_FILES = [
    PROJECT / "app.py",
    *(file for folder in FOLDERS_WITH_CODE for file in sorted((PROJECT / folder).rglob("*.py"))),
]
MAX_LINES_PER_FUNCTION = 60
MAX_LINES_PER_FILE = 400  # of engine and webui
# They say nothing of what a value is; nobody searches for them.
FILLERS = {"one", "found", "told", "given", "said", "wanted", "asked"}


def label(file: Path) -> str:
    return file.relative_to(PROJECT).as_posix()


def bound(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that is bound in a file: variables, parameters, functions, classes and imports, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname, node.lineno) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def fillers(file: Path) -> Iterator[tuple[str, int]]:
    tree = tree_of(file)
    # A field of a dataclass that is written to disk or sent to a browser is a contract.
    fields = {
        (node.target.id, node.lineno)
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return ((name, line) for name, line in bound(tree) if name in FILLERS and (name, line) not in fields)


def test_no_name_is_a_filler() -> None:
    assert [f"{label(file)}:{line}: {name}" for file in FILES for name, line in fillers(file)] == []


def test_every_module_begins_with_its_one_job() -> None:
    assert [label(file) for file in FILES if not ast.get_docstring(tree_of(file))] == []


def long_functions(file: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_LINES_PER_FUNCTION:
                yield f"{label(file)}: {node.name} has {lines} lines"


def test_a_function_can_be_seen_at_once() -> None:
    assert [text for file in ALL_FILES for text in long_functions(file)] == []


def test_a_module_has_one_job_and_few_lines() -> None:
    lengths = {label(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES_PER_FILE} == {}
