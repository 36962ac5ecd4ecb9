"""What a document consists of, whatever its format: headings and paragraphs, in reading order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")  # Chinese and Japanese have no spaces between words
MAX_CHARACTERS = 20_000_000  # of the text of a document


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph. `level`: of a heading, from 1; 0 for a paragraph. `page`: from 1; None if the format
    has no pages. `continues`: it goes on in the middle of the sentence with which the page before ended."""

    text: str
    level: int = 0
    page: int | None = None
    continues: bool = False


@dataclass(frozen=True)
class Document:
    """A document that has been read.

    `pages`: their number, 0 without pages; `empty_pages` have no text, such as scanned ones, and the text of
    `unreadable_pages` cannot be extracted. `repeated_lines`: the number of headers, footers and page numbers that were
    left out. `encoding`: of a text, if it was guessed from its bytes and could be another.
    """

    file: str
    blocks: Sequence[Block]
    pages: int = 0
    empty_pages: Sequence[int] = ()
    unreadable_pages: Sequence[int] = ()
    repeated_lines: int = 0
    encoding: str = ""

    @property
    def characters(self) -> int:
        return sum(len(block.text) for block in self.blocks)
