"""Read a document (pdf, docx, md, txt) into headings and paragraphs, in a separate process with limits.

Lines that a PDF repeats on most of its pages (headers, footers, page numbers) are left out and counted, and the entries
of its outline become headings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.documents.blocks import MAX_CHARACTERS, WIDE, Block, Document

PDF, WORD, TEXT = "engine.documents.pdf_pages", "engine.documents.word_text", "engine.documents.plain_text"
READERS = {".pdf": PDF, ".docx": WORD, ".md": TEXT, ".markdown": TEXT, ".txt": TEXT}
MAX_DOCUMENT_BYTES = 256 << 20
PAGES_AT_ONCE = 50  # of a PDF, in one process
MAX_SECONDS = 300  # of CPU time, for so many pages or a document of another format
MIN_PAGES_WITH_HEADERS = 4
MAX_HEADER_LINES = 3  # at each end of a page
HEADER_SHARE = 0.5  # of the pages; a first or last line that is on more of them is a header or footer
FINISHED = re.compile(r"[.!?:;。！？；：…][\"'”’」』）)\]]*\Z")  # a sentence
OnPages = Callable[[int, int], None]  # the number of pages that have been read, and of all


def read_document(file: Path, on_pages: OnPages = lambda done, total: None) -> Document:
    """What the document consists of. Raises Refusal if it cannot be read, is encrypted, is too large, or has no text
    at all."""
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise Refusal(problem("document-format", file=file.name, known=", ".join(READERS)))
    if (size := file.stat().st_size) > MAX_DOCUMENT_BYTES:
        limit = f"{MAX_DOCUMENT_BYTES >> 20:,} MB"
        raise Refusal(problem("document-too-large", file=file.name, size=f"{size >> 20:,} MB", limit=limit))
    if not size:
        raise Refusal(problem("document-empty", file=file.name))
    try:
        document = _read_pdf(file, on_pages) if suffix == ".pdf" else _read_whole(file, READERS[suffix])
    except Refusal as refusal:
        if [issue.code for issue in refusal.problems] == ["file-takes-too-much"]:
            raise Refusal(problem("document-takes-too-much", file=file.name)) from None
        raise
    if not document.blocks:
        code = "document-scanned" if document.pages else "document-empty"
        raise Refusal(problem(code, file=file.name, pages=document.pages))
    return document


def _read_whole(file: Path, module: str) -> Document:
    answer = limited_process.ask(module, file, seconds=MAX_SECONDS)
    blocks = [Block(text, level) for text, level in answer["blocks"]]
    return Document(file.name, blocks, encoding=answer.get("encoding", ""))


def _read_pdf(file: Path, on_pages: OnPages) -> Document:
    texts: list[str | None] = []
    outline: list[tuple[int, str, int]] = []
    total = PAGES_AT_ONCE
    while len(texts) < total:
        answer = limited_process.ask(PDF, file, seconds=MAX_SECONDS, first=len(texts), count=PAGES_AT_ONCE)
        total = answer["pages"]
        texts += answer["texts"]
        outline += [(level, title, page) for level, title, page in answer["outline"]]
        if sum(len(text or "") for text in texts) > MAX_CHARACTERS:
            raise Refusal(problem("document-too-long", file=file.name, limit=f"{MAX_CHARACTERS:,}"))
        on_pages(len(texts), total)
    pages = [[line.strip() for line in (text or "").splitlines()] for text in texts]
    empty = [number for number, text in enumerate(texts, 1) if text is not None and not text.strip()]
    repeated = leave_out_headers(pages)
    unreadable = [number for number, text in enumerate(texts, 1) if text is None]
    return Document(file.name, list(page_blocks(pages, outline)), total, empty, unreadable, repeated)


def leave_out_headers(pages: Sequence[list[str]]) -> int:
    """Remove the first and last lines that are on most pages, whatever the numbers in them; returns how many."""
    return sum(_leave_out(pages, end) for end in (0, -1) for _ in range(MAX_HEADER_LINES))


def _leave_out(pages: Sequence[list[str]], end: int) -> int:
    """Remove the first (0) or last (-1) line that is not blank, if it is on most pages."""
    places = [[at for at, line in enumerate(lines) if line] for lines in pages]
    edges = [(lines, at[end]) for lines, at in zip(pages, places, strict=True) if at]
    counts = Counter(_without_numbers(lines[at]) for lines, at in edges)
    common, often = next(iter(counts.most_common(1)), ("", 0))
    if often < MIN_PAGES_WITH_HEADERS or often <= HEADER_SHARE * len(pages):
        return 0
    for lines, at in edges:
        if _without_numbers(lines[at]) == common:
            del lines[at]
    return often


def _without_numbers(line: str) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", line.casefold())


def page_blocks(pages: Sequence[list[str]], outline: Sequence[tuple[int, str, int]]) -> Iterator[Block]:
    """The blocks of pages, given as lines. A line that is an entry of the outline is a heading; if there is no such
    line on its page, the heading is at the top of it."""
    before = Block("", 1)
    for number, lines in enumerate(pages, 1):
        entries = {_plain(title): (title, level) for level, title, page in outline if page == number}
        present = set(map(_plain, lines))
        blocks = [Block(*entry, number) for title, entry in entries.items() if title not in present]
        blocks += [Block(text, level, number) for text, level in _paragraphs(lines, entries)]
        for at, block in enumerate(blocks):
            is_open = at == 0 and not before.level and not block.level and not FINISHED.search(before.text)
            before = replace(block, continues=is_open)
            yield before


def _paragraphs(lines: Sequence[str], headings: Mapping[str, tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Paragraphs, which blank lines and headings end, and the headings; each of these counts once."""
    left, paragraph = dict(headings), list[str]()
    for line in [*lines, ""]:
        heading = left.pop(_plain(line), None)
        if line and not heading:
            paragraph.append(line)
            continue
        if paragraph:
            yield join_lines(paragraph), 0
            paragraph = []
        if heading:
            yield heading


def _plain(line: str) -> str:
    return "".join(line.casefold().split())


def join_lines(lines: Sequence[str]) -> str:
    """The lines of a paragraph as one: a word that was divided at the end of a line is whole again, and no space comes
    between Chinese characters."""
    text = ""
    for line in lines:
        if re.search(r"[^\W\d_]-\Z", text) and line[:1].islower():
            text = text[:-1] + line
        elif re.search(r"\w-\Z", text):
            text += line
        elif text and not (WIDE.match(text[-1]) and WIDE.match(line[:1])):
            text = f"{text} {line}"
        else:
            text += line
    return text
