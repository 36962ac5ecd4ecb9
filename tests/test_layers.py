"""Who may import whom, read from the syntax trees: see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path

import pytest

from engine.launch.workspace import PROJECT

TRAINING = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers"}
# Packages in the order of docs/architecture.md: each imports only those before it, and itself.
ENGINE = (
    "core", "spec", "notifications", "models", "launch", "data", "preflight", "evaluation", "export", "runs", "serving",
    "documents", "api", "mcp", "importer",
)  # fmt: skip
WORKER = ("runtime", "templates", "models", "data", "generation", "evaluation", "training", "exporting", "serving")


@cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, wherever in it: late imports and those of type checkers count."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


@cache
def file_of(module: str) -> Path | None:
    path = PROJECT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


@cache
def arrows(file: Path) -> frozenset[str]:
    """The modules of this project that a file imports. A package counts where a
    name of its own is imported, not where it is only on the way to a module."""
    names = imports(file)
    modules = {name for name in names if name.split(".")[0] in ("engine", "webui") and file_of(name)}
    on_the_way = {
        name
        for name in modules
        if file_of(name).name == "__init__.py" and any(other.startswith(f"{name}.") for other in names)
    }
    return modules - on_the_way - {module_of(file)}


def reached(file: Path) -> set[str]:
    """The modules of this project that a file imports, and what those import in turn."""
    modules, left = set(), [file]
    while left:
        new = arrows(left.pop()) - modules
        modules |= new
        left += [file_of(module) for module in new]
    return modules


def files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


ENGINE_FILES = [file for file in files("engine") if "worker" not in file.relative_to(PROJECT).parts]


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def label(file: Path) -> str:
    return file.relative_to(PROJECT).as_posix()


def wrong_imports(
    where: Iterable[Path], of: Callable[[Path], Collection[str]], are_wrong: Callable[[str], bool]
) -> list[str]:
    return [f"{label(file)}: {name}" for file in where for name in sorted(of(file)) if are_wrong(name)]


def is_of(*names: str) -> Callable[[str], bool]:
    """Whether an imported module is one of these, or inside it."""
    return lambda module: any(module == name or module.startswith(f"{name}.") for name in names)


def test_the_page_knows_no_training_stack_and_no_worker() -> None:
    page = [PROJECT / "app.py", *files("webui")]
    assert wrong_imports(page, imports, is_of(*TRAINING, "engine.worker")) == []


def test_the_engine_knows_no_page_and_no_training_stack() -> None:
    forbidden = is_of(*TRAINING, "gradio", "webui", "app", "engine.worker")
    assert wrong_imports(ENGINE_FILES, imports, forbidden) == []


def test_only_the_interface_for_programs_knows_a_web_server() -> None:
    allowed = {"engine/api/app.py", "engine/api/bodies.py", "engine/api/server.py", "engine/mcp/server.py"}
    others = [file for file in ENGINE_FILES if label(file) not in allowed]
    assert wrong_imports(others, imports, is_of("starlette", "uvicorn", "fastapi", "python_multipart")) == []


def test_a_worker_knows_no_page_and_nobody_who_starts_runs() -> None:
    assert wrong_imports(files("engine/worker"), imports, is_of("gradio", "webui", "app")) == []
    starters = {f"engine.runs.{name}" for name in ("runs", "queue", "supervisor", "progress", "plan")}
    assert wrong_imports(files("engine/worker"), reached, starters.__contains__) == []


def package(module: str, above: str, order: tuple[str, ...]) -> int:
    """The place of a module's package in an order; main paths stand above all packages."""
    name = module.removeprefix(f"{above}.").split(".")[0]
    return order.index(name) if name in order else len(order)


@pytest.mark.parametrize(
    ("above", "order", "where"), [("engine", ENGINE, ENGINE_FILES), ("engine.worker", WORKER, files("engine/worker"))]
)
def test_packages_import_downwards_only(above: str, order: tuple[str, ...], where: list[Path]) -> None:
    for file in where:
        own = package(module_of(file), above, order)
        inside = [name for name in arrows(file) if name.startswith(f"{above}.")]
        assert [name for name in inside if package(name, above, order) > own] == [], label(file)


def test_every_folder_of_the_engine_is_a_package_in_the_order() -> None:
    folders = {path.parent.name for path in (PROJECT / "engine").glob("*/__init__.py")}
    assert folders == {*ENGINE, "worker"}
    assert {path.parent.name for path in (PROJECT / "engine/worker").glob("*/__init__.py")} == set(WORKER)


def test_no_module_imports_itself_by_way_of_others() -> None:
    every = [PROJECT / "app.py", *files("webui"), *files("engine")]
    assert not [label(file) for file in every if module_of(file) in reached(file)]


def test_an_import_of_an_import_is_seen() -> None:
    file = PROJECT / "engine/worker/export.py"
    assert "engine.export.vllm_command" not in arrows(file)
    assert "engine.export.vllm_command" in reached(file)


def tab_of(module: str) -> str | None:
    """The tab that a module of the page belongs to: a tab is a file or a folder of panels."""
    return next((part for part in module.split(".")[1:2] if part.endswith("_tab")), None)


def test_tabs_do_not_import_each_other() -> None:
    tabs = {file: tab_of(module_of(file)) for file in files("webui")}
    assert {"train_tab", "data_tab"} < set(tabs.values())
    for file, own in tabs.items():
        if own:
            assert {tab_of(name) for name in arrows(file)} <= {None, own}, label(file)


def test_nothing_is_given_to_a_shell_or_unpickled() -> None:
    for file in [PROJECT / "app.py", *files("webui"), *files("engine")]:
        text = file.read_text(encoding="utf-8")
        assert "shell=True" not in text
        assert "os.system" not in text
        assert "pickle" not in tops(file)
