"""Run the tests that depend on what has changed: python -m tests.changed [--since COMMIT] [--list] [pytest's arguments]

Changed is what differs from COMMIT (the last commit if none is given) or is not committed. A test depends on
a module that it imports or names ("engine.worker.train"), or that a module it depends on imports or names. A
changed file that is no module counts for every module of its folder, and one that is neither in engine/ nor
webui/ for the tests that name it, or whose helpers do. Where nothing can be told, every test is run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from engine.launch.workspace import PROJECT
from tests.test_layers import arrows, file_of

NAMED = re.compile(r"\b(?:engine|webui|tests|bench|docs)(?:\.\w+)+")
SHARED = ("requirements", "pyproject.toml", "tests/conftest.py", "Makefile")  # change everything


def changed_files(since: str) -> list[Path]:
    """Files that differ from a commit or are new."""

    def git(*words: str) -> list[str]:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()

    names = git("diff", "--name-only", since) + git("ls-files", "--others", "--exclude-standard")
    return [PROJECT / name for name in dict.fromkeys(names)]


@cache
def imported(file: Path) -> frozenset[Path]:
    """The files that a file imports: modules, and helpers of the tests."""
    helpers = re.findall(r"^from tests(?:\.\w+)? import .+|^from tests\.(\w+)", file.read_text(encoding="utf-8"), re.M)
    names = {name for line in helpers for name in re.findall(r"\w+", line)}
    paths = {file_of(module) for module in arrows(file)} | {file_of(f"tests.{name}") for name in names}
    return frozenset(path for path in paths if path) - {file}


@cache
def started(file: Path) -> frozenset[Path]:
    """The files of the programs that a file starts, or may: modules that it
    names in a string, the shell, the studio."""
    text = file.read_text(encoding="utf-8")
    names = {name.rsplit(".", cut)[0] for name in NAMED.findall(text) for cut in (0, 1)}
    names |= {"engine.__main__"} if re.search(r"\bengine\(", text) else set()
    names |= {"app"} if "start_studio" in text or file.parent.name == "browser" else set()
    paths = {PROJECT / "app.py" if name == "app" else file_of(name) for name in names}
    return frozenset(path for path in paths if path) - {file}


def all_needs(test: Path) -> set[Path]:
    """All that a test file depends on. Only one with slow tests starts real
    trainings: of the others the programs that they start themselves count, and not
    those that these would start. What conftest.py starts counts where it is used."""
    slow = test.parent.name == "browser" or "mark.slow" in test.read_text(encoding="utf-8")
    reached, left = set(), [test, *started(test)]
    while left:
        file = left.pop()
        new = {
            file,
            *imported(file),
            *(started(file) if slow and file.name != "conftest.py" else ()),
        } - reached
        reached |= new
        left += new - {file}
    return reached


def concerned(changes: list[Path]) -> list[Path]:
    """The test files that depend on any of the changed files."""
    tests = sorted((PROJECT / "tests").rglob("test_*.py"))
    if any(change.relative_to(PROJECT).as_posix().startswith(SHARED) for change in changes):
        return tests
    modules = {change for change in changes if change.suffix == ".py"}
    others = [change for change in changes if change.suffix != ".py"]
    for other in others:
        if other.relative_to(PROJECT).parts[0] in ("engine", "webui"):
            modules |= {file for file in other.parents[0].rglob("*.py")} | set(other.parents[1].glob("*.py"))
    return [
        test
        for test in tests
        if (needs := all_needs(test)) & modules
        or any(other.name in text_with_helpers(test, needs) for other in others)
        or (test.stem == "test_docs" and any(other.suffix == ".md" for other in others))
    ]


def text_with_helpers(test: Path, needs: set[Path]) -> str:
    """The text of a test file and of the test helpers that it imports."""
    helpers = {file for file in needs if PROJECT / "tests" in file.parents and file.name != "conftest.py"}
    return "\n".join(file.read_text(encoding="utf-8") for file in {test, *helpers})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--since", default="HEAD", metavar="COMMIT", help="what the working tree is compared with")
    parser.add_argument("--list", action="store_true", help="only say which tests they are")
    arguments, further = parser.parse_known_args()
    tests = [str(test.relative_to(PROJECT)) for test in concerned(changed_files(arguments.since))]
    print(*tests or ["no test depends on what has changed"], sep="\n")
    return 0 if arguments.list or not tests else pytest.main([*tests, *further])


if __name__ == "__main__":
    sys.exit(main())
