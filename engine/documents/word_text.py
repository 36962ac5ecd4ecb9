"""A Word document (docx) → headings and paragraphs. Runs in a limited process.

It is read as the zip of XML that it is: text that was inserted with changes tracked, in content controls and in text
boxes counts; deleted text, headers, footers, footnotes and comments do not.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.documents.blocks import MAX_CHARACTERS

MAX_XML_BYTES = 256 << 20  # of one part, unpacked
BODY, STYLES = "word/document.xml", "word/styles.xml"
SKIPPED = {"del", "moveFrom", "Fallback"}  # deleted text, and the second version of a text box
HEADING_STYLE = re.compile(r"heading ([1-9])")
MAX_STYLE_DEPTH = 20  # styles that are based on each other
Paragraph = tuple[str, int]  # text, and level of a heading


def _answer(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as packed:
            body = _part(packed, BODY, file)
            levels = _levels(_part(packed, STYLES, file)) if STYLES in packed.namelist() else {}
        blocks = [(text, level) for text, level in _paragraphs(body, levels) if text]
    except (ElementTree.ParseError, RecursionError) as error:
        raise Refusal(problem("document-broken", file=file.name, why=error)) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
        raise Refusal(problem("document-no-word", file=file.name, why=error)) from error
    if sum(len(text) for text, _ in blocks) > MAX_CHARACTERS:
        raise Refusal(problem("document-too-long", file=file.name, limit=f"{MAX_CHARACTERS:,}"))
    return {"blocks": blocks}


def _part(packed: zipfile.ZipFile, name: str, file: Path) -> Element:
    """A part of the document, of which no more is unpacked than is allowed, whatever size the zip declares."""
    with packed.open(name) as part:
        content = part.read(MAX_XML_BYTES + 1)
    if len(content) > MAX_XML_BYTES:
        raise Refusal(problem("document-bomb", file=file.name, limit=f"{MAX_XML_BYTES >> 20:,} MB"))
    return ElementTree.fromstring(content)


def _local(element: Element) -> str:
    """The name without its namespace, of which there are two: transitional and strict."""
    return str(element.tag).rpartition("}")[2]


def _value(element: Element | None) -> str:
    attributes = {} if element is None else element.attrib
    return next((value for name, value in attributes.items() if name.rpartition("}")[2] == "val"), "")


def _child(element: Element | None, *names: str) -> Element | None:
    """The descendant along these names."""
    for name in names:
        element = next((inner for inner in element if _local(inner) == name), None) if element is not None else None
    return element


def _levels(styles: Element) -> Mapping[str, int]:
    """The level of headings by the id of their style, also of styles based on one."""
    by_id = {
        next((value for name, value in style.attrib.items() if name.rpartition("}")[2] == "styleId"), ""): style
        for style in styles
        if _local(style) == "style"
    }
    return {id: level for id in by_id if (level := _level_of_style(id, by_id))}


def _level_of_style(id: str, by_id: Mapping[str, Element]) -> int:
    for _ in range(MAX_STYLE_DEPTH):
        if id not in by_id:
            return 0
        style = by_id[id]
        name = _value(_child(style, "name")).lower()
        if heading := HEADING_STYLE.fullmatch(name):
            return int(heading[1])
        if name == "title":
            return 1
        if (outline := _value(_child(style, "pPr", "outlineLvl"))).isdecimal() and int(outline) < 9:
            return int(outline) + 1
        id = _value(_child(style, "basedOn"))
    return 0


def _paragraphs(parent: Element, levels: Mapping[str, int]) -> Iterator[Paragraph]:
    """The paragraphs and tables, wherever they are nested."""
    for element in parent:
        name = _local(element)
        if name == "p":
            yield _paragraph(element, levels)
        elif name == "tbl":
            yield _table(element), 0
        elif name not in SKIPPED:
            yield from _paragraphs(element, levels)


def _paragraph(element: Element, levels: Mapping[str, int]) -> Paragraph:
    text = _text(element).strip()
    properties = _child(element, "pPr")
    outline = _value(_child(properties, "outlineLvl"))
    level = levels.get(_value(_child(properties, "pStyle")), 0)
    if outline.isdecimal() and int(outline) < 9:
        level = int(outline) + 1
    if level:
        return " ".join(text.split()), level
    return (f"- {text}" if text and _child(properties, "numPr") is not None else text), 0


def _table(table: Element) -> str:
    """A line for each row, cells separated by a bar."""
    rows = [" | ".join(" ".join(_text(cell).split()) for cell in _inside(row, "tc")) for row in _inside(table, "tr")]
    return "\n".join(row for row in rows if row.replace("|", "").strip())


def _inside(parent: Element, name: str) -> Iterator[Element]:
    """The next descendants of that name, also within content controls."""
    for element in parent:
        if _local(element) == name:
            yield element
        elif _local(element) not in SKIPPED:
            yield from _inside(element, name)


def _text(element: Element) -> str:
    """The text as it is shown, with tabs, line breaks, and the paragraphs within it on lines of their own."""
    pieces: list[str] = []
    for inner in element:
        name = _local(inner)
        if name == "t":
            pieces.append(inner.text or "")
        elif name == "tab":
            pieces.append("\t")
        elif name in ("br", "cr"):
            pieces.append("\n")
        elif name in ("p", "tr"):
            pieces.append(f"\n{_text(inner)}\n")
        elif name not in SKIPPED and name != "pPr":
            pieces.append(_text(inner))
    return "".join(pieces)


if __name__ == "__main__":
    limited_process.reply(_answer)
