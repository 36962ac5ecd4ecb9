"""Plain text and Markdown → headings and paragraphs. Runs in a limited process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.data.encodings import encoding_of, read_text
from engine.documents.blocks import MAX_CHARACTERS

MARKDOWN_SUFFIXES = (".md", ".markdown")
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")  # of a heading on the line above
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
Paragraph = tuple[str, int]  # text, and level of a heading


def _answer(file: Path) -> dict[str, Any]:
    text = read_text(file)
    if len(text) > MAX_CHARACTERS:
        raise Refusal(problem("document-too-long", file=file.name, limit=f"{MAX_CHARACTERS:,}"))
    encoding = encoding_of(file)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n").replace("\0", "").split("\n")
    paragraphs = markdown(lines) if file.suffix.lower() in MARKDOWN_SUFFIXES else plain(lines)
    return {"blocks": list(paragraphs), "encoding": "" if encoding.sure else encoding.label}


def plain(lines: list[str]) -> Iterator[Paragraph]:
    """Paragraphs, which blank lines separate."""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield "\n".join(paragraph), 0
            paragraph = []


def markdown(lines: list[str]) -> Iterator[Paragraph]:
    """Headings, and everything between blank lines as it is written: lists, tables and code, too."""
    paragraph: list[str] = []
    fence = ""
    for line in lines:
        opening = FENCE.match(line)
        if fence:
            paragraph.append(line)
            if opening and opening[1].startswith(fence) and not line[opening.end() :].strip():
                fence = ""
            continue
        heading, underline = HEADING.fullmatch(line), UNDERLINE.fullmatch(line)
        if underline and len(paragraph) == 1 and not paragraph[0].lstrip().startswith(("-", "*", ">", "|")):
            yield paragraph[0].strip(), 1 if underline[1][0] == "=" else 2
            paragraph = []
            continue
        if (heading or not line.strip()) and paragraph:
            yield "\n".join(paragraph), 0
            paragraph = []
        if heading:
            if heading[2]:
                yield heading[2].strip(), len(heading[1])
        elif line.strip():
            paragraph.append(line.rstrip())
            fence = opening[1] if opening else ""
    if paragraph:
        yield "\n".join(paragraph), 0


if __name__ == "__main__":
    limited_process.reply(_answer)
