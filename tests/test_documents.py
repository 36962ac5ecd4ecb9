"""Documents become passages with their sources, and what cannot be read of them is a sentence."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pypdf
import pytest

from engine.core.problems import Refusal
from engine.documents.blocks import Block, Document
from engine.documents.document_reader import join_lines, leave_out_headers, page_blocks, read_document
from engine.documents.passages import passages_of
from engine.documents.plain_text import markdown
from engine.documents.support import support
from tests.written_documents import pdf, word_manual

FILTER = ["The filter holds back sand. It must be", "cleaned every 250 hours, or after a stand-", "still of a week."]


def manual() -> list[list[str] | None]:
    """Six pages with header and page number: a sentence goes on from page 1 to 2, and page 4 is scanned."""
    texts: list[list[str] | None] = [
        ["1 Filter", *FILTER, "", "The lid is closed by hand and then"],
        ["turned to the right. 盖子必须", "拧紧。"],
        ["2 Motor", "The motor needs 230 V."],
        None,
        ["It starts after 3 seconds."],
        ["It stops by itself."],
    ]
    return [lines and ["Pump P7", *lines, f"- {number} -"] for number, lines in enumerate(texts, 1)]


def test_a_pdf_is_read_with_its_pages_its_outline_and_without_its_headers(tmp_path: Path) -> None:
    file = tmp_path / "pump.pdf"
    file.write_bytes(pdf(manual(), [("1 Filter", 1), ("2 Motor", 3), ("Not on its page", 5)], broken=6))
    pages: list[tuple[int, int]] = []
    document = read_document(file, lambda done, total: pages.append((done, total)))
    assert pages == [(6, 6)]
    assert (document.pages, document.empty_pages, document.unreadable_pages) == (6, [4], [6])
    assert document.repeated_lines == 8
    assert [block.text for block in document.blocks if block.level] == ["1 Filter", "2 Motor", "Not on its page"]
    passage = next(passage for passage in passages_of(document, length=400) if passage.headings == ("1 Filter",))
    assert passage.source == {"file": "pump.pdf", "pages": [1, 2], "headings": ["1 Filter"]}
    assert "after a standstill of a week." in passage.text
    assert "closed by hand and then turned to the right. 盖子必须拧紧。" in passage.text


def test_a_word_document_is_read_as_it_is_shown(tmp_path: Path) -> None:
    document = read_document(word_manual(tmp_path / "manual.docx"))
    texts = [(block.text, block.level) for block in document.blocks]
    assert texts == [
        ("Pump P7", 1),
        ("Cleaning", 1),
        ("Clean the filter every 250 hours.", 0),
        ("Switch the pump off.", 0),
        ("Open the lid.", 0),
        ("清洗剂", 2),
        ("只使用中性清洗剂。不要用酸。", 0),
        ("Figures", 1),
        ("Pressure | \nbar | 4.5 | max", 0),
    ]


def test_chinese_text_in_gb18030_is_read_and_a_guess_is_said(tmp_path: Path) -> None:
    file = tmp_path / "说明.txt"
    paragraphs = ["水泵必须每运行二百五十小时清洗一次滤网。" * 3, "启动之前请检查电源电压。" * 3]
    file.write_bytes("\n\n".join(paragraphs).encode("gb18030"))
    document = read_document(file)
    assert [block.text for block in document.blocks] == paragraphs
    file.write_bytes("\n\n".join(paragraphs).encode("utf-16"))
    assert [block.text for block in read_document(file).blocks] == paragraphs


def unreadable(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, and the code of why."""
    locked = io.BytesIO()
    writer = pypdf.PdfWriter(io.BytesIO(pdf([["secret"]])))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(locked)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("word/document.xml", "w") as part:
        for _ in range(257):
            part.write(bytes(1 << 20))
    entities = io.BytesIO()
    with zipfile.ZipFile(entities, "w") as packed:
        names = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 99}">' for n in range(1, 9))
        packed.writestr("word/document.xml", f'<!DOCTYPE d [<!ENTITY a0 "laugh">{names}]><d>&a8;</d>')
    return {
        "locked.pdf": (locked.getvalue(), "document-locked"),
        "scanned.pdf": (pdf([None, None]), "document-scanned"),
        "torn.pdf": (pdf([["text"]])[:60], "document-broken"),
        "old.docx": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "document-no-word"),
        "bomb.docx": (bomb.getvalue(), "document-bomb"),
        "laughs.docx": (entities.getvalue(), "document-broken"),
        "blank.md": (b"\n  \n", "document-empty"),
        "nothing.txt": (b"", "document-empty"),
        "picture.png": (b"png", "document-format"),
    }


def test_what_cannot_be_read_is_a_sentence_that_names_the_file(tmp_path: Path) -> None:
    for name, (content, code) in unreadable(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal) as refused:
            read_document(tmp_path / name)
        assert [issue.code for issue in refused.value.problems] == [code], refused.value
        assert name in refused.value.problems[0].text()


def test_markdown_has_headings_of_both_kinds_and_keeps_code_whole() -> None:
    text = "Title\n=====\n\nFirst\nline.\n## Part two ##\n```sh\n# no heading\n\nls\n```\n- a\n- b\n\nPart\n---\n"
    assert list(markdown(text.split("\n"))) == [
        ("Title", 1),
        ("First\nline.", 0),
        ("Part two", 2),
        ("```sh\n# no heading\n\nls\n```\n- a\n- b", 0),
        ("Part", 2),
    ]


def test_passages_end_where_sections_and_sentences_do() -> None:
    sentence = "The valve number {} closes as soon as the pressure falls. "
    long = "".join(sentence.format(number) for number in range(60)).strip()
    blocks = [
        Block("Valves", 1), Block("Closing", 2), Block(long, page=7), Block("And again.", page=8),
        Block("Opening", 2), Block(long, page=9), Block("Notes", 1), Block("Short."), Block("More", 1), Block("Tiny."),
    ]  # fmt: skip
    passages = passages_of(Document("valves.pdf", blocks), 5, 1_000)
    assert [passage.number for passage in passages] == list(range(5, 5 + len(passages)))
    closing = [passage for passage in passages if passage.headings == ("Valves", "Closing")]
    assert [passage.pages for passage in closing] == [(7, 7)] * (len(closing) - 1) + [(7, 8)]
    assert all(passage.text.endswith(".") and passage.text.startswith(("The valve", "And")) for passage in closing)
    assert all(len(passage.text) <= 1_250 for passage in passages)
    assert " ".join(passage.text for passage in closing).replace("\n\n", " ") == f"{long} And again."
    assert passages[-1].headings == ("Notes",)
    assert passages[-1].text == "Short.\n\nMore\n\nTiny."


def test_chinese_passages_are_half_as_long_and_nothing_is_lost() -> None:
    text = "".join(f"第{number}号阀门在压力下降时立即关闭。" for number in range(100))
    passages = passages_of(Document("阀门.txt", [Block(text)]), length=600)
    assert all(len(passage.text) <= 375 and passage.text.endswith("。") for passage in passages)
    assert "".join(passage.text for passage in passages) == text
    unbroken = passages_of(Document("x.txt", [Block("x" * 10_000)]), length=1_000)
    assert sum(len(passage.text) for passage in unbroken) == 10_000


def test_lines_of_pages_are_joined_as_a_reader_does() -> None:
    assert join_lines(["a stand-", "still, an e-mail and a Rolls-", "Royce", "of 中", "文"]) == (
        "a standstill, an e-mail and a Rolls-Royce of 中文"
    )
    pages = [["P7", "text", "Page i of iv"], ["P7", "more", "Page ii of iv"], ["P7", "x", "Page iii of iv"]]
    assert leave_out_headers(pages) == 0  # three pages are too few to know
    assert leave_out_headers([*pages, ["P7", "y", "Page iv of iv"]]) == 8
    (block,) = page_blocks([["One.", "Two."]], [])
    assert (block.text, block.page) == ("One. Two.", 1)


@pytest.mark.parametrize(
    ("answer", "share", "missing"),
    [
        ("Clean the filter every 250 hours.", 1.0, ()),
        ("Clean the filter every 300 hours.", 0.8, ("300",)),
        ("Replace the membrane.", 0.0, ()),
        ("滤网要清洗", 0.75, ()),
        ("250", 1.0, ()),
        ("", 1.0, ()),
    ],
)
def test_support_is_the_share_of_an_answer_that_stands_in_its_passage(
    answer: str, share: float, missing: tuple[str, ...]
) -> None:
    measure = support(answer, "Clean the filter every 250 hours. 滤网必须清洗，网要洗。")
    assert (measure.share, measure.missing_numbers) == (pytest.approx(share), missing)
