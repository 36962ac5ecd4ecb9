"""Who may import whom, read from the syntax trees: see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.workplace import PROJECT

TRAINING = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers"}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).glob("*.py"))


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", [PROJECT / "app.py", *files("webui")], ids=lambda file: file.name)
def test_the_page_knows_no_training_stack_and_no_worker(file: Path) -> None:
    assert not tops(file) & TRAINING
    assert not any(name.startswith("engine.worker") for name in imports(file))


@pytest.mark.parametrize("file", files("engine"), ids=lambda file: file.name)
def test_the_engine_knows_no_page_and_no_training_stack(file: Path) -> None:
    assert not tops(file) & (TRAINING | {"gradio", "webui", "app"})
    assert not any(name.startswith("engine.worker") for name in imports(file))


@pytest.mark.parametrize("file", files("engine/worker"), ids=lambda file: file.name)
def test_a_worker_knows_no_page_and_nobody_who_starts_runs(file: Path) -> None:
    assert not tops(file) & {"gradio", "webui", "app"}
    outer = {
        name for name in imports(file) if name.startswith("engine.") and not name.startswith("engine.worker")
    }
    assert not {name.split(".")[1] for name in outer} & {"runs", "queue", "keeper", "progress", "plan"}


def test_tabs_do_not_import_each_other() -> None:
    for file in (PROJECT / "webui").glob("*_tab.py"):
        assert not [name for name in imports(file) if name.endswith("_tab")]


def test_nothing_is_given_to_a_shell_or_unpickled() -> None:
    for file in [PROJECT / "app.py", *files("webui"), *files("engine"), *files("engine/worker")]:
        text = file.read_text(encoding="utf-8")
        assert "shell=True" not in text
        assert "os.system" not in text
        assert "pickle" not in tops(file)
