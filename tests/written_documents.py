"""Documents for tests, written by other means than those that read them: a PDF byte by byte, docx by python-docx; and a
draft as its process leaves it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

from engine.core.rundir import append_lines, write_json
from engine.data.draft_folders import DRAFTS_FOLDER
from engine.documents.drafts import Draft
from engine.documents.passages import Passage
from engine.launch.workspace import Workplace

TO_UNICODE = (
    b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /A def /CMapType 2 def "
    b"1 begincodespacerange <0000> <FFFF> endcodespacerange 1 beginbfrange <0000> <FFFF> <0000> endbfrange "
    b"endcmap end end"
)


def pdf(pages: Sequence[Sequence[str] | None], outline: Sequence[tuple[str, int]] = (), broken: int = 0) -> bytes:
    """A PDF whose pages have these lines, "" for a blank one; None is a page with a picture of text only. `outline`:
    titles with their page, from 1. The content of page `broken` is not what it says."""
    objects = [b"", b""]  # the catalog and the tree of pages, which refer to what comes after them

    def add(content: bytes) -> int:
        objects.append(content)
        return len(objects)

    def stream(content: bytes, head: bytes = b"") -> bytes:
        packed = zlib.compress(content)
        return b"<< /Length %d /Filter /FlateDecode %s>>\nstream\n%s\nendstream" % (len(packed), head, packed)

    unicode = add(stream(TO_UNICODE))
    inner = add(
        b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /A /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity)"
        b" /Supplement 0 >> /DW 500 >>"
    )
    font = add(
        b"<< /Type /Font /Subtype /Type0 /BaseFont /A /Encoding /Identity-H /DescendantFonts [%d 0 R] /ToUnicode %d 0 R"
        b" >>" % (inner, unicode)
    )
    kids = []
    for number, lines in enumerate(pages, 1):
        shown = b"".join(
            b"BT /F 12 Tf 50 %d Td <%s> Tj ET\n" % (780 - 16 * at, line.encode("utf-16-be").hex().encode())
            for at, line in enumerate(lines or [])
            if line
        )
        content = add(stream(shown or b"0 0 100 100 re f"))
        if number == broken:
            objects[content - 1] = b"<< /Length 4 /Filter /LZWDecode /DecodeParms 7 >>\nstream\nnope\nendstream"
        kids.append(
            add(
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R"
                b" /Resources << /Font << /F %d 0 R >> >> >>" % (content, font)
            )
        )
    entries = b""
    if outline:
        first = len(objects) + 2
        root = add(b"<< /First %d 0 R /Last %d 0 R >>" % (first, first + len(outline) - 1))
        for at, (title, page) in enumerate(outline):
            following = b"/Next %d 0 R" % (first + at + 1) if at + 1 < len(outline) else b""
            named = b"\xfe\xff" + title.encode("utf-16-be")
            target = kids[page - 1]
            add(
                b"<< /Title <%s> /Parent %d 0 R /Dest [%d 0 R /Fit] %s >>"
                % (named.hex().encode(), root, target, following)
            )
        entries = b"/Outlines %d 0 R" % root
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R %s >>" % entries
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(b"%d 0 R" % kid for kid in kids))
    return _file(objects)


def _file(objects: Sequence[bytes]) -> bytes:
    text, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(text))
        text += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return text + b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        size, table, size, len(text),
    )  # fmt: skip


def word_manual(path: Path) -> Path:
    """A manual with headings of two levels, a list, a table with joined cells, and an inserted and a deleted word."""
    import docx
    from docx.oxml import parse_xml

    document = docx.Document()
    document.add_heading("Pump P7", 0)
    document.add_heading("Cleaning", 1)
    document.add_paragraph("Clean the filter every 250 hours.")
    for step in ("Switch the pump off.", "Open the lid."):
        document.add_paragraph(step, "List Bullet")
    document.add_heading("清洗剂", 2)
    changed = document.add_paragraph("只使用中性清洗剂。")
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    for kind, tag, word in (("ins", "t", "不要用酸。"), ("del", "delText", "可以用酸。")):
        run = f"<w:r><w:{tag}>{word}</w:{tag}></w:r>"
        changed._p.append(parse_xml(f'<w:{kind} {space} w:id="1" w:author="x">{run}</w:{kind}>'))
    document.add_heading("Figures", 1)
    table = document.add_table(2, 3)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "Pressure"
    for at, text in enumerate(("bar", "4.5", "max")):
        table.cell(1, at).text = text
    document.save(path)
    return path


def complete_draft(place: Workplace, name: str, by: str) -> Draft:
    """A draft with 25 rows whose support is 1/25, 2/25 …; the last row repeats the first."""
    folder = place.saves / DRAFTS_FOLDER / "20261130-120000-abcd"
    folder.mkdir(parents=True)
    settings = {"base": "m", "similarity": 0.8}
    workplace = {"models": [], "data": str(place.data), "remote_code": []}
    request = {"name": name, "by": by, "files": ["a.md"], "settings": settings, "workplace": workplace}
    write_json(folder / "request.json", {"what": "documents", "given": request})
    passages = [Passage(number, "a.md", (name,), None, f"Part {number} is {name}.") for number in range(1, 26)]
    append_lines(folder / "passages.jsonl", [passage.as_record() for passage in passages])
    for number in range(1, 26):
        about = number if number < 25 else 1
        answer = f"It is {name}. {hashlib.sha256(bytes([about])).hexdigest()}"  # unlike those of others
        row = {"id": f"{number}.1", "question": f"What is part {about}?", "answer": answer, "score": 5}
        row |= {"support": number / 25, "missing": [], "reason": "so"}
        append_lines(folder / "rows.jsonl", [{"passage": number, "rows": [row]}])
    write_json(folder / "reading.json", [{"file": "a.md", "passages": 25}])
    write_json(folder / "duplicates.json", {"25.1": ["1.1", 1.0]})
    write_json(folder / "result.json", {})
    return Draft(folder)
