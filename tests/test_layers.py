"""Who may import whom, read from the syntax trees: see docs/architecture.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from engine.workplace import PROJECT

TRAINING = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers"}


@cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reached(file: Path) -> set[str]:
    """The same, and what the engine's modules among them import in turn."""
    found, left = set(), [file]
    while left:
        new = imports(left.pop()) - found
        found |= new
        places = (PROJECT / f"{name.replace('.', '/')}.py" for name in new if name.startswith("engine."))
        left += [place for place in places if place.is_file()]
    return found


def files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).glob("*.py"))


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", [PROJECT / "app.py", *files("webui")], ids=lambda file: file.name)
def test_the_page_knows_no_training_stack_and_no_worker(file: Path) -> None:
    assert not tops(file) & TRAINING
    assert not any(name.startswith("engine.worker") for name in imports(file))


@pytest.mark.parametrize("file", [*files("engine"), *files("engine/importer")], ids=lambda file: file.name)
def test_the_engine_knows_no_page_and_no_training_stack(file: Path) -> None:
    assert not tops(file) & (TRAINING | {"gradio", "webui", "app"})
    assert not any(name.startswith("engine.worker") for name in imports(file))


@pytest.mark.parametrize("file", files("engine/worker"), ids=lambda file: file.name)
def test_a_worker_knows_no_page_and_nobody_who_starts_runs(file: Path) -> None:
    assert not tops(file) & {"gradio", "webui", "app"}
    assert not reached(file) & {f"engine.{name}" for name in ("runs", "queue", "keeper", "progress", "plan")}


def test_who_is_reached_by_way_of_others_is_seen() -> None:
    file = PROJECT / "engine/worker/export.py"
    assert "engine.deploy" not in set(imports(file))
    assert "engine.deploy" in reached(file)


def test_tabs_do_not_import_each_other() -> None:
    for file in (PROJECT / "webui").glob("*_tab.py"):
        assert not [name for name in imports(file) if name.endswith("_tab")]


def test_nothing_is_given_to_a_shell_or_unpickled() -> None:
    for file in [
        PROJECT / "app.py",
        *files("webui"),
        *files("engine"),
        *files("engine/importer"),
        *files("engine/worker"),
    ]:
        text = file.read_text(encoding="utf-8")
        assert "shell=True" not in text
        assert "os.system" not in text
        assert "pickle" not in tops(file)
