"""Pages of a PDF → their text, and the outline. Runs in a limited process, for some pages at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.documents.blocks import MAX_CHARACTERS

if TYPE_CHECKING:
    from pypdf import PdfReader

MAX_PAGES = 10_000
MAX_OUTLINE_ENTRIES = 5_000
MAX_OUTLINE_DEPTH = 9
# What extractors write for glyphs without a meaning: replacements, control characters, and the private use area.
NO_CHARACTER = re.compile("[\ufffd\x00-\x08\x0e-\x1f\ue000-\uf8ff]")
MAX_NO_CHARACTER_SHARE = 0.2  # of a page's text; the rest is then hardly right either


def _answer(file: Path, first: int, count: int) -> dict[str, Any]:
    """The texts of `count` pages from `first` on, from 0; with the first ones also the outline."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of each oddity of a file
    reader = _open(file)
    total = len(reader.pages)
    if total > MAX_PAGES:
        raise Refusal(problem("document-many-pages", file=file.name, pages=f"{total:,}", limit=f"{MAX_PAGES:,}"))
    texts = [_text(reader, number) for number in range(first, min(first + count, total))]
    if sum(len(text or "") for text in texts) > MAX_CHARACTERS:
        raise Refusal(problem("document-too-long", file=file.name, limit=f"{MAX_CHARACTERS:,}"))
    return {"pages": total, "texts": texts, "outline": list(_outline(reader)) if first == 0 else []}


def _open(file: Path) -> PdfReader:
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(file)
        # Many are encrypted without a password, only to forbid printing.
        locked = reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED
        if not locked:
            len(reader.pages)
    except DependencyError as error:
        raise Refusal(problem("document-broken", file=file.name, why=error)) from error
    except MemoryError:
        raise
    except Exception as error:  # of any kind: pypdf says that broken files might cause others than its own
        raise Refusal(problem("document-broken", file=file.name, why=str(error) or type(error).__name__)) from error
    if locked:
        raise Refusal(problem("document-locked", file=file.name))
    return reader


def _text(reader: PdfReader, number: int) -> str | None:
    """The text of a page; None if it cannot be extracted."""
    try:
        text = reader.pages[number].extract_text()
    except MemoryError:
        raise
    except Exception:  # see above; the other pages may be fine
        return None
    text = text.encode("utf-8", "replace").decode()
    if len(NO_CHARACTER.findall(text)) > MAX_NO_CHARACTER_SHARE * len(text):
        return None
    return NO_CHARACTER.sub("", text)


def _outline(reader: PdfReader) -> Iterator[tuple[int, str, int]]:
    """The entries of the outline: level from 1, title, page from 1. A broken one is no outline."""
    try:
        entries = list(_entries(reader, reader.outline, 1))
    except MemoryError:
        raise
    except Exception:  # see above
        return
    yield from entries[:MAX_OUTLINE_ENTRIES]


def _entries(reader: PdfReader, outline: Any, level: int) -> Iterator[tuple[int, str, int]]:
    for entry in outline:
        if isinstance(entry, list):
            yield from _entries(reader, entry, min(level + 1, MAX_OUTLINE_DEPTH))
            continue
        page = reader.get_destination_page_number(entry)
        title = " ".join(str(entry.title or "").encode("utf-8", "replace").decode().split())
        if page is not None and title:
            yield level, title, page + 1


if __name__ == "__main__":
    limited_process.reply(_answer)
