"""Pages of the documentation: their links lead somewhere, and their commands are known to the shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from engine import __main__ as shell
from engine.launch.workspace import PROJECT

PAGES = [
    PROJECT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
COMMAND = re.compile(r"python -m engine ([a-z][^\n`|]*)")
PLACEHOLDERS = {"STAGE": "dpo", "阶段": "dpo"}
TARGET = re.compile(r"(?:^ {4}|`|&& )make ([a-z][\w-]*)", re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor[1:] not in anchors(target)):
            broken.append(path + anchor)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_command_is_known_to_the_shell(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser, unknown = shell.parser(), []
    for command in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = [PLACEHOLDERS.get(word, word) for word in command.split("#")[0].split(" > ")[0].split()]
        # A verb alone is named, not shown with its arguments.
        words = words if len(words) > 1 else [*words, "--help"]
        try:
            parser.parse_args([word for word in words if word not in ("…", "\\", "&")])
        except SystemExit as end:
            unknown += [command] if end.code else []
    assert unknown == [], capsys.readouterr().err


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {target for page in PAGES for target in TARGET.findall(page.read_text(encoding="utf-8"))}
    assert named - targets == set()
