"""The headings and paragraphs of a document → passages of similar length, each with its source.

A passage ends where a section does. Sections that are too long are divided between paragraphs, else between sentences,
else between lines or words; sections that are too short are joined with the next.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.documents.blocks import WIDE, Block, Document

PASSAGE_CHARACTERS = 1_500
WIDE_SHARE = 0.3  # of a document's characters, from which its passages have half as many: a character says more
MIN_SHARE = 0.25  # of a passage's length; shorter ones are joined with a neighbour
PARAGRAPH_END = re.compile(r"\n\n")
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)\s+|[。！？；][”’」』）]*\s*")
LINE_END, SPACE = re.compile(r"\n"), re.compile(r"\s+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document: its number in the draft, from 1; its file; the headings above it, the highest first; its
    first and last page, None if the format has no pages."""

    number: int
    file: str
    headings: tuple[str, ...]
    pages: tuple[int, int] | None
    text: str

    @property
    def source(self) -> dict[str, Any]:
        """Where it is, as kept with each row of a data set."""
        source: dict[str, Any] = {"file": self.file}
        if self.pages:
            source["pages"] = list(self.pages)
        return source | ({"headings": list(self.headings)} if self.headings else {})

    def as_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Passage:
        pages = record["pages"]
        return cls(
            record["number"],
            record["file"],
            tuple(record["headings"]),
            (pages[0], pages[1]) if pages else None,
            record["text"],
        )


@dataclass
class _Section:
    """The text below a heading. `starts` and `pages`: from which character on it is from which page."""

    headings: tuple[str, ...]
    text: str = ""
    starts: list[int] = field(default_factory=list)
    pages: list[int | None] = field(default_factory=list)

    def add(self, block: Block) -> None:
        if self.text and block.continues:
            self.text += "" if WIDE.match(self.text[-1]) else " "
        elif self.text:
            self.text += "\n\n"
        self.starts.append(len(self.text))
        self.pages.append(block.page)
        self.text += block.text

    def pages_of(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and last page of a part of the text."""
        first, last = (self.pages[bisect_right(self.starts, at) - 1] for at in (start, max(end - 1, start)))
        return (first, last) if first is not None and last is not None else None


def passages_of(document: Document, first_number: int = 1, length: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """The passages of a document, numbered from `first_number`. `length`: their characters, about; half as many of
    Chinese."""
    wide = sum(len(WIDE.findall(block.text)) for block in document.blocks)
    if wide > WIDE_SHARE * max(document.characters, 1):
        length //= 2
    passages: list[Passage] = []
    for section in _sections(document, int(length * MIN_SHARE)):
        for start, end in _cuts(section.text, length):
            text = section.text[start:end].strip()
            pages = section.pages_of(start, end)
            if text:
                passages.append(Passage(first_number + len(passages), document.file, section.headings, pages, text))
    return passages


def _sections(document: Document, least: int) -> Iterator[_Section]:
    """The sections of a document. One with fewer characters than `least` gets the next one, with its heading."""
    path: list[tuple[int, str]] = []
    section = _Section(())
    for block in document.blocks:
        if not block.level:
            section.add(block)
            continue
        while path and path[-1][0] >= block.level:
            path.pop()
        path.append((block.level, block.text))
        if len(section.text) >= least:
            yield section
            section = _Section(())
        if section.text:
            section.add(block)
        else:
            section = _Section(tuple(title for _, title in path))
    if section.text:
        yield section


def _cuts(text: str, length: int) -> Iterator[tuple[int, int]]:
    """The beginnings and ends of pieces of at most about `length` characters, without a tiny one at the end."""
    start = 0
    while len(text) - start > length * (1 + MIN_SHARE):
        end = start + _last_break(text[start : start + length])
        yield start, end
        start = end
    yield start, len(text)


def _last_break(text: str) -> int:
    """The best place to divide: the last end of a paragraph in the second half, else of a sentence, a line or a
    word."""
    for pattern, least in ((PARAGRAPH_END, 0.5), (SENTENCE_END, MIN_SHARE), (LINE_END, MIN_SHARE), (SPACE, MIN_SHARE)):
        ends = [match.end() for match in pattern.finditer(text) if match.end() >= least * len(text)]
        if ends:
            return ends[-1]
    return len(text)
