"""Files from outside are taken in under safe names, never over another, and a workbook only if it is what it says."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.core.problems import Problem, Refusal
from engine.core.rundir import write_json
from engine.data import chunks, image_folders, limited_process, row_files, uploads
from engine.data.datasets import dataset_of, examples, find, read_dataset_info
from engine.data.images import IMAGE_MARK
from engine.data.row_images import images_of
from engine.data.uploads import receive, safe_name
from engine.launch.workspace import PROJECT
from webui.data_tab.data_folder import DataFolder

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def related(**targets: str) -> str:
    """What an office file says of its parts: id → part, a worksheet but for the document itself."""
    lines = "".join(
        (
            f'<Relationship Id="{id}" '
            f'Type="{RELATIONS}/{"officeDocument" if id == "document" else "worksheet"}" Target="{part}"/>'
        )
        for id, part in targets.items()
    )
    return f'<Relationships xmlns="{PACKAGE}">{lines}</Relationships>'


def workbook(file: Path, sheet: str, shared: str = "", styles: str = "", more: dict[str, str] | None = None) -> Path:
    """A workbook as Excel writes it, with this as the rows of its second, only visible sheet."""
    parts = {
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{RELATIONS}"><sheets>'
        '<sheet name="hidden" state="hidden" r:id="r1"/><sheet name="数据" r:id="r2"/></sheets></workbook>',
        "_rels/.rels": related(document="xl/workbook.xml"),
        "xl/_rels/workbook.xml.rels": related(r2="worksheets/two.xml", r1="worksheets/one.xml"),
        "xl/worksheets/two.xml": f'<worksheet xmlns="{MAIN}"><sheetData>{sheet}</sheetData></worksheet>',
    }
    if shared:
        parts["xl/sharedStrings.xml"] = f'<sst xmlns="{MAIN}">{shared}</sst>'
    if styles:
        parts["xl/styles.xml"] = f'<styleSheet xmlns="{MAIN}">{styles}</styleSheet>'
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in (parts | (more or {})).items():
            packed.writestr(name, text)
    return file


def text(cell: str, said: str) -> str:
    return f'<c r="{cell}" t="inlineStr"><is><t>{said}</t></is></c>'


HEADER = f"<row>{text('A1', 'instruction')}{text('B1', 'output')}</row>"


def rows_of(file: Path, folder: Path) -> list[dict[str, str]]:
    arrived = receive(file, file.name, folder)
    assert arrived.suffix == ".jsonl"
    return [json.loads(line) for line in arrived.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("names.json", "names.json"),
        ("../../etc/passwd.txt", "passwd.txt"),
        ("C:\\files\\x.CSV", "x.csv"),
        ("数据 集 (1).jsonl", "数据 集 (1).jsonl"),
        ('it\'s "x"; rm -rf .json', "it_s _x_ rm -rf.json"),
        (".hidden.json", "hidden.json"),
        ("...", "data"),
        ("a\0b\n.txt", "a_b_.txt"),
        ("день.txt", "день.txt"),
    ],
)
def test_a_name_becomes_a_safe_one_of_the_same_letters(given, name):
    assert safe_name(given) == name


def test_a_very_long_name_is_shortened_and_keeps_its_end():
    name = safe_name("长" * 300 + ".parquet")
    assert len(name.encode()) < 200
    assert name.endswith(".parquet")


def test_a_file_never_overwrites_another(tmp_path, data):
    source = tmp_path / "x"
    for content in ("[1]", "[2]", "[3]"):
        source.write_text(content)
        receive(source, "../names.json", data)
    assert {file.name: file.read_text() for file in data.iterdir()} == {
        "names.json": "[1]",
        "names-2.json": "[2]",
        "names-3.json": "[3]",
    }


@pytest.mark.parametrize("given", ["x.exe", "x", "dataset_info", "x.json.rar", "x.tar"])
def test_what_is_no_data_file_is_refused_with_what_may_come(tmp_path, data, given):
    (tmp_path / "x").write_text("x")
    with pytest.raises(Refusal, match=r"\.xlsx"):
        receive(tmp_path / "x", given, data)
    assert list(data.iterdir()) == []


def test_the_catalogue_itself_cannot_be_uploaded_over(tmp_path, data):
    (data / "dataset_info.json").write_text("{}")
    (tmp_path / "x").write_text('{"evil": {"file_name": "/etc/passwd"}}')
    assert receive(tmp_path / "x", "dataset_info.json", data).name == "dataset_info-2.json"
    assert (data / "dataset_info.json").read_text() == "{}"


def test_an_empty_or_a_too_large_file_is_a_sentence(tmp_path, data, monkeypatch):
    (tmp_path / "x").write_text("")
    with pytest.raises(Refusal, match="is empty"):
        receive(tmp_path / "x", "x.json", data)
    (tmp_path / "x").write_text("x" * 100)
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(Refusal, match="uploads are limited to"):
        receive(tmp_path / "x", "x.json", data)


def test_files_that_no_set_names_are_offered(tmp_path, data):
    (data / "named.json").write_text("[]")
    (data / "loose.csv").write_text("a")
    (data / "deep").mkdir()
    (data / "deep" / "more.txt").write_text("x")
    (data / ".hidden.json").write_text("[]")
    (data / "note.md").write_text("x")
    (data / "model").mkdir()
    (data / "model" / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text("[]")
    (data / "link.json").symlink_to(tmp_path / "secret.json")
    (data / "dataset_info.json").write_text('{"named": {"file_name": "named.json"}}')
    assert set(uploads.unregistered(data, read_dataset_info(data)[0])) == {"loose.csv", "deep/more.txt"}


# ------------------------------------------------------------------------------------------ workbooks


def test_a_workbook_becomes_rows_of_text(tmp_path, data):
    shared = (
        "<si><t>What is it?</t></si><si><r><t xml:space='preserve'>rich </t></r>"
        "<r><t>text</t></r><rPh><t>reading</t></rPh></si>"
    )
    styles = (
        '<numFmts><numFmt numFmtId="164" formatCode="yyyy/mm/dd"/>'
        '<numFmt numFmtId="165" formatCode="&quot;day&quot; 0"/></numFmts>'
        '<cellXfs><xf numFmtId="0"/><xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="22"/></cellXfs>'
    )
    sheet = (
        f"{HEADER}<row/>"
        '<row><c r="A3" t="s"><v>0</v></c><c r="B3" t="s"><v>1</v></c></row>'
        '<row><c r="A4"><v>3</v></c><c r="B4"><v>0.1</v></c></row>'
        '<row><c r="A5" s="1"><v>45292</v></c><c r="B5" s="2"><v>7</v></c></row>'
        '<row><c r="A6" s="3"><v>45292.5</v></c><c r="B6" t="b"><v>1</v></c></row>'
        f"<row>{text('B7', 'only &lt;b&gt; _x000A_ line')}{text('D7', 'beside')}</row>"
        '<row><c r="A8" t="str"><f>1+1</f><v>two</v></c><c r="B8" t="e"><v>#N/A</v></c></row>'
    )
    assert rows_of(workbook(tmp_path / "表 1.xlsx", sheet, shared, styles), data) == [
        {"instruction": "What is it?", "output": "rich text"},
        {"instruction": "3", "output": "0.1"},
        {"instruction": "2024-01-01", "output": "7"},
        {"instruction": "2024-01-01 12:00:00", "output": "true"},
        {"instruction": "", "output": "only <b> \n line", "column D": "beside"},
        {"instruction": "two", "output": ""},
    ]
    assert {file.name for file in data.iterdir()} == {"表 1.jsonl", ".表 1.jsonl.rows"}


@pytest.mark.parametrize("where", ["sheet", "shared"])
def test_a_zip_bomb_is_refused_before_it_fills_anything(tmp_path, data, where):
    bomb = "<row>" + text("A1", "x" * 60_000_000) + "</row>"
    if where == "sheet":
        file = workbook(tmp_path / "bomb.xlsx", HEADER + bomb)
    else:
        file = workbook(tmp_path / "bomb.xlsx", HEADER, f"<si><t>{'x' * 60_000_000}</t></si>")
    assert file.stat().st_size < 200_000
    with pytest.raises(Refusal, match="unpacks to far more"):
        receive(file, file.name, data)
    assert list(data.iterdir()) == []


def test_a_sheet_of_much_text_that_packs_well_is_no_bomb(tmp_path, data):
    row = "<row>" + text("A{n}", "Translate the name of this organisation: {n}") + text("B{n}", "答案 {n}") + "</row>"
    sheet = HEADER + "".join(row.replace("{n}", str(n)) for n in range(2, 3000))
    assert len(rows_of(workbook(tmp_path / "x.xlsx", sheet), data)) == 2998


def shared_text(file: Path, cells: int) -> Path:
    """A workbook in which one text of 30,000 characters is shared by that many cells, of which each is a row."""
    return workbook(file, HEADER + '<row><c t="s"><v>0</v></c></row>' * cells, f"<si><t>{'x' * 30_000}</t></si>")


READ = """
import json, resource, sys
from pathlib import Path
from engine.core.problems import Refusal
from engine.data import limited_process, workbooks
limited_process.MAX_MEMORY = int(sys.argv[2])
limited_process.MAX_WRITTEN_BYTES = int(sys.argv[3])
try:
    rows = workbooks.to_jsonl(Path(sys.argv[1]), Path(sys.argv[1] + ".jsonl")).rows
except Refusal as refusal:
    rows = [problem.code for problem in refusal.problems]
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10]))
"""


def read_within(file: Path, memory: int, written: int = 1 << 40) -> tuple[Any, int]:
    """How many rows were read, or why none; and the most memory that the reading process took, in bytes."""
    ran = subprocess.run(
        [sys.executable, "-c", READ, str(file), str(memory), str(written)],
        cwd=PROJECT,
        timeout=300,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(ran.stdout))


def test_a_small_workbook_of_gigabytes_is_refused_in_bounded_memory(tmp_path):
    file = shared_text(tmp_path / "x.xlsx", 500_000)
    assert file.stat().st_size < 50_000
    refused, memory = read_within(file, 512 << 20)
    assert refused == ["file-takes-too-much"]
    assert memory < 512 << 20
    rows, memory = read_within(shared_text(tmp_path / "y.xlsx", 10_000), 2 << 30)
    assert rows == 10_000
    assert memory > 300 << 20  # without a limit it is all taken
    refused, _ = read_within(tmp_path / "y.xlsx", 2 << 30, written=100 << 20)
    assert refused == ["file-takes-too-much"]
    assert (tmp_path / "y.xlsx.jsonl").stat().st_size <= 100 << 20


@pytest.mark.parametrize("suffix", [".xlsx", ".ods"])
def test_a_cell_far_away_takes_no_memory_for_those_between(tmp_path, suffix):
    if suffix == ".xlsx":
        file = workbook(tmp_path / "x.xlsx", f'{HEADER}<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>')
    else:
        cells = (
            '<table:table-cell office:value-type="string" table:number-columns-repeated="16384">'
            "<text:p>x</text:p></table:table-cell>"
        )
        file = calc(
            tmp_path / "x.ods",
            f'<table:table-row table:number-rows-repeated="1048576">{cells}</table:table-row>',
        )
    refused, memory = read_within(file, 512 << 20)
    assert refused == ["file-takes-too-much"]
    assert memory < 512 << 20


@pytest.mark.parametrize("lie", ["smaller", "larger"])
def test_what_a_workbook_says_of_its_size_is_not_believed(tmp_path, data, lie):
    file = tmp_path / "x.xlsx"
    honest = workbook(
        tmp_path / "honest.xlsx",
        HEADER + "<row>" + text("A2", "x" * 60_000_000) + "</row>" if lie == "smaller" else HEADER * 2,
    )
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            content = source.read(member)
            target.writestr(member.filename, content)
            if lie == "smaller":
                target.infolist()[-1].file_size = min(len(content), 100)
                target.infolist()[-1].CRC = zlib.crc32(content[:100])
            else:
                target.infolist()[-1].file_size = 2 << 30
    with pytest.raises(Refusal, match="unpacks to far more"):
        receive(file, file.name, data)


def calc(file: Path, rows: str) -> Path:
    """A spreadsheet as LibreOffice writes it, with these as the rows of its only sheet."""
    names = {name: f"urn:oasis:names:tc:opendocument:xmlns:{name}:1.0" for name in ("office", "table", "text")}
    spaces = " ".join(f'xmlns:{name}="{value}"' for name, value in names.items())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("META-INF/manifest.xml", "<manifest/>")
        archive.writestr(
            "content.xml",
            (
                f'<office:document-content {spaces}><office:body><office:spreadsheet><table:table table:name="one">'
                f"{rows}</table:table></office:spreadsheet></office:body></office:document-content>"
            ),
        )
    return file


def test_a_sheet_of_libreoffice_becomes_rows_of_text(tmp_path, data):
    def cell(kind: str, value: str = "", name: str = "value", shown: str = "") -> str:
        held = f'office:{name}="{value}"' * bool(value)
        return (
            f'<table:table-cell office:value-type="{kind}" {held}><text:p>{shown or value}</text:p></table:table-cell>'
        )

    rows = (
        [cell("string", shown="a"), cell("string", shown="b")],
        [cell("float", "12"), cell("string", shown="007")],
        [cell("boolean", "true", "boolean-value"), cell("date", "2024-02-03", "date-value")],
    )
    file = calc(tmp_path / "x.ods", "".join(f"<table:table-row>{''.join(row)}</table:table-row>" for row in rows))
    assert rows_of(file, data) == [{"a": "12", "b": "007"}, {"a": "true", "b": "2024-02-03"}]


@pytest.mark.parametrize("name", ["table.xls", "date.xlsb"])
def test_workbooks_of_older_formats_become_rows_of_text(data, name):
    rows = {
        "table.xls": [
            {"topic": "numbers", "question": "12", "answer": "007"},
            {"topic": "numbers", "question": "0.5", "answer": "true"},
            {"topic": "", "question": "2024-02-03", "answer": "2024-02-03 04:05:06"},
        ],
        "date.xlsb": [{"2021-01-01": "2021-01-02", "15": "16"}, {"2021-01-01": "255:10:10", "15": "17"}],
    }
    assert rows_of(Path(__file__).parent / "workbooks" / name, data) == rows[name]


def test_a_workbook_with_macros_keeps_its_kind_beside_its_rows(tmp_path, data):
    file = several_sheets(tmp_path / "book.xlsm")
    receive(file, file.name, data)
    assert uploads.workbook_of(data / "book.jsonl") == data / ".book.jsonl.xlsm"
    uploads.choose_sheet(data / "book.jsonl", "three & co")
    assert (data / "book.jsonl").read_text() == '{"x": "3", "y": "4"}\n'


def test_rows_are_counted_from_the_edge_of_the_sheet(tmp_path, data):
    lines = (
        '<row r="3">' + text("C3", "x") + text("E3", "y") + "</row>",
        '<row r="4">' + text("C4", "1") + text("E4", "2") + text("G4", "3") + "</row>",
    )
    assert rows_of(workbook(tmp_path / "x.xlsx", "".join(lines)), data) == [{"x": "1", "y": "2", "column G": "3"}]


def test_entities_that_multiply_are_refused(tmp_path, data):
    laughs = (
        '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
        f'<worksheet xmlns="{MAIN}"><sheetData><row>{text("A1", "&b;")}</row></sheetData></worksheet>'
    )
    file = workbook(tmp_path / "x.xlsx", "", more={"xl/worksheets/two.xml": laughs})
    with pytest.raises(Refusal, match="unrecognized entity"):
        receive(file, "x.xlsx", data)


@pytest.mark.parametrize("content", [b"PK\x03\x04 not really", b"\xd0\xcf\x11\xe0 an old or locked one", b"a,b\n1,2\n"])
def test_what_only_calls_itself_a_workbook_is_a_sentence(tmp_path, data, content):
    (tmp_path / "x.xlsx").write_bytes(content)
    with pytest.raises(Refusal, match="cannot be read as a workbook"):
        receive(tmp_path / "x.xlsx", "x.xlsx", data)
    assert list(data.iterdir()) == []


def test_a_damaged_workbook_or_one_without_sheets_is_a_sentence(tmp_path, data):
    whole = workbook(tmp_path / "x.xlsx", HEADER * 500).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:200] + b"\xff" * 40 + whole[240:]):
        (tmp_path / "x.xlsx").write_bytes(content)
        with pytest.raises(Refusal, match="cannot be read as a workbook"):
            receive(tmp_path / "x.xlsx", "x.xlsx", data)
    file = workbook(tmp_path / "y.xlsx", "", more={"xl/workbook.xml": f'<workbook xmlns="{MAIN}"/>'})
    with pytest.raises(Refusal, match="no sheet"):
        receive(file, "y.xlsx", data)
    file = workbook(tmp_path / "z.xlsx", '<row><c r="A1" t="s"><v>9</v></c></row>')
    with pytest.raises(Refusal, match="cannot be read as a workbook"):
        receive(file, "z.xlsx", data)


def test_two_columns_of_one_name_in_a_workbook_are_refused(tmp_path, data):
    file = workbook(tmp_path / "x.xlsx", sheet(("a", "a"), ("1", "2")))
    with pytest.raises(Refusal, match="duplicate column names: a"):
        receive(file, "x.xlsx", data)


def sheet(*rows: tuple[str, ...], merged: str = "") -> str:
    """The XML of a sheet; an empty text is no cell."""
    lines = "".join(
        f'<row r="{number}">'
        + "".join(text(f"{'ABCDEF'[at]}{number}", cell) for at, cell in enumerate(row) if cell)
        + "</row>"
        for number, row in enumerate(rows, start=1)
    )
    ranges = "".join(f'<mergeCell ref="{one}"/>' for one in merged.split())
    return f"{lines}</sheetData><mergeCells>{ranges}</mergeCells><sheetData>" if merged else lines


def received(file: Path, folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    notes: list[Problem] = []
    arrived = receive(file, file.name, folder, notes.append)
    rows = [json.loads(line) for line in arrived.read_text(encoding="utf-8").splitlines()]
    assert all(note.text("en") != note.text("zh") for note in notes)
    return rows, [note.code for note in notes]


def test_a_title_above_the_header_is_no_header(tmp_path, data):
    table = (("instruction", "", "output"), ("Hi", "", "Hello."), ("Ho", "", "Hey."))
    rows = [{"instruction": "Hi", "output": "Hello."}, {"instruction": "Ho", "output": "Hey."}]
    file = workbook(tmp_path / "a.xlsx", sheet(("Questions of 2026",), ("", "by us"), (), *table, merged="A1:C1"))
    assert received(file, data) == (rows, ["sheet-title"])
    assert received(workbook(tmp_path / "b.xlsx", sheet(*table)), data) == (rows, [])
    # In a sheet of one column nothing is a title, whatever stands beside a text of it.
    file = workbook(tmp_path / "c.xlsx", sheet(("text",), ("one",), ("two", "a remark"), ("three",)))
    assert received(file, data) == (
        [{"text": "one"}, {"text": "two", "column B": "a remark"}, {"text": "three"}],
        [],
    )


def test_what_is_merged_downwards_stands_in_each_of_its_rows(tmp_path, data):
    file = workbook(
        tmp_path / "a.xlsx",
        sheet(
            ("system", "instruction", "output"),
            ("Be kind.", "Hi", "Hello."),
            ("", "Ho", "Hey."),
            (),
            ("", "He", "Hu."),
            ("", "Last", "one."),
            merged="A2:A5 B3:C3",
        ),
    )
    rows, notes = received(file, data)
    assert [row["system"] for row in rows] == ["Be kind.", "Be kind.", "Be kind.", ""]
    assert [row["output"] for row in rows] == ["Hello.", "Hey.", "Hu.", "one."]
    assert notes == ["sheet-merged"]


def several_sheets(file: Path) -> Path:
    rows = {
        "one": sheet(("Read me first.",), ("Thank you.",)),
        "two": sheet(("q", "a"), ("1", "2")),
        "three": sheet(("x", "y"), ("3", "4")),
    }
    parts = {
        f"xl/worksheets/{name}.xml": f'<worksheet xmlns="{MAIN}"><sheetData>{text}</sheetData></worksheet>'
        for name, text in rows.items()
    }
    listed = "".join(f'<sheet name="{name} & co" r:id="r{name}"/>'.replace("&", "&amp;") for name in rows)
    parts["xl/workbook.xml"] = f'<workbook xmlns="{MAIN}" xmlns:r="{RELATIONS}"><sheets>{listed}</sheets></workbook>'
    parts["xl/_rels/workbook.xml.rels"] = related(**{f"r{name}": f"/xl/worksheets/{name}.xml" for name in rows})
    return workbook(file, "", more=parts)


def test_of_several_sheets_the_first_table_is_read_and_another_can_be_chosen(tmp_path, data):
    file = several_sheets(tmp_path / "book.xlsx")
    assert received(file, data) == ([{"q": "1", "a": "2"}], ["sheet-others"])
    arrived = data / "book.jsonl"
    assert uploads.sheets_of(arrived) == (["two & co", "three & co"], "two & co")
    uploads.choose_sheet(arrived, "three & co")
    assert arrived.read_text() == '{"x": "3", "y": "4"}\n'
    assert uploads.sheets_of(arrived)[1] == "three & co"
    for name in ("", "gone", "../../etc/passwd", "\0"):
        with pytest.raises(Refusal):
            uploads.choose_sheet(arrived, name or " ")
    assert arrived.read_text() == '{"x": "3", "y": "4"}\n'
    assert uploads.unregistered(data, []) == ["book.jsonl"]
    uploads.forget_workbook(arrived)
    assert uploads.sheets_of(arrived) == ([], "")
    assert {file.name for file in data.iterdir()} == {"book.jsonl", ".book.jsonl.rows"}


def test_rows_of_a_workbook_are_called_as_in_their_sheet(tmp_path, data):
    table = (("Questions of 2026",), ("q", "a"), ("1", "2"), (), ("3", "4"), ("5", "6"))
    received(workbook(tmp_path / "book.xlsx", sheet(*table)), data)
    arrived = data / "book.jsonl"

    def places() -> list[str]:
        return [str(place) for place, _ in row_files.entries(arrived)]

    assert places() == ["book.xlsx:数据!A3", "book.xlsx:数据!A5", "book.xlsx:数据!A6"]
    [chunk] = chunks.blocks(arrived)
    in_chunks = [str(place) for place, _ in chunk.rows(lambda issue: None)]
    assert in_chunks == places()
    with arrived.open("a") as file:
        file.write('{"q": "7", "a": "8"}\n')  # by hand, after which the lines may be anywhere
    assert places() == [f"book.jsonl:{line}" for line in (1, 2, 3, 4)]
    for arrived in (data / "other.jsonl", data / "other-2.jsonl"):  # both of a workbook with the same name
        received(several_sheets(tmp_path / "other.xlsx"), data)
        assert places() == ["other.xlsx:'two & co'!A2"]
        uploads.choose_sheet(arrived, "three & co")
        assert places() == ["other.xlsx:'three & co'!A2"]
    arrived.write_text(arrived.read_text().replace("3", "9"))  # as long as before
    assert places() == ["other-2.jsonl:1"]


def test_a_file_in_no_set_is_removed_with_its_workbook_and_nothing_else_is(tmp_path, data):
    received(several_sheets(tmp_path / "book.xlsx"), data)
    (tmp_path / "outside.json").write_text("[]")
    (data / "link.json").symlink_to(tmp_path / "outside.json")
    (data / "used.json").write_text("[]")
    (data / "dataset_info.json").write_text('{"used": {"file_name": "used.json"}}')
    for name in ("used.json", "../outside.json", "link.json", "dataset_info.json", ".book.jsonl.xlsx", "gone.json", ""):
        with pytest.raises(Refusal):
            uploads.remove(data, name)
    for broken in (
        "{",
        '{"other": {"file_name": "book.jsonl", "formatting": "lama"}}',
        '{"other": {"file_name": ["a.json", "book*"], "formatting": "lama"}}',
        '{"other": {"file_name": {"a": 1}}}',
    ):
        sound = (data / "dataset_info.json").read_text()
        (data / "dataset_info.json").write_text(broken)
        with pytest.raises(Refusal, match="may use it"):
            uploads.remove(data, "book.jsonl")
        (data / "dataset_info.json").write_text(sound)
    gone = '{"used": {"file_name": "used.json"}, "gone": {"file_name": "gone.json"}}'
    (data / "dataset_info.json").write_text(gone)  # whose file is somewhere else, or not there
    uploads.remove(data, "book.jsonl")
    assert {file.name for file in data.iterdir()} == {"dataset_info.json", "link.json", "used.json"}
    assert (tmp_path / "outside.json").exists()


def test_a_sheet_that_is_still_read_when_its_workbook_is_forgotten_changes_nothing(tmp_path, data, monkeypatch):
    received(several_sheets(tmp_path / "book.xlsx"), data)
    arrived, read = data / "book.jsonl", uploads.workbooks.to_jsonl
    before = arrived.read_text()

    def read_slowly(*about):
        table = read(*about)
        uploads.forget_workbook(arrived)  # by a click that comes meanwhile
        return table

    monkeypatch.setattr(uploads.workbooks, "to_jsonl", read_slowly)
    with pytest.raises(Refusal):
        uploads.choose_sheet(arrived, "three & co")
    assert arrived.read_text() == before
    assert {file.name for file in data.iterdir()} == {"book.jsonl", ".book.jsonl.rows"}


def packed(folder: Path, suffix: str, content: bytes) -> Path:
    import pyarrow

    file = folder / f"rows.csv{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner/names 名.csv", content)
            archive.writestr("__MACOSX/inner/._names.csv", b"x")
    elif suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(content)
    else:
        file.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    return file


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_a_packed_file_is_unpacked(tmp_path, data, suffix, monkeypatch):
    content = b"instruction,output\n" + b"Hi,Hello\n" * 2000
    file = packed(tmp_path, suffix, content)
    arrived = receive(file, file.name, data)
    assert arrived.name == ("names 名.csv" if suffix == ".zip" else "rows.csv")
    assert arrived.read_bytes() == content
    for wrong in (file.read_bytes()[: file.stat().st_size // 2], b"not packed at all"):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(Refusal, match="cannot be unpacked"):
            receive(tmp_path / "wrong", file.name, data)
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 5000)
    with pytest.raises(Refusal, match="unpacks to more than"):
        receive(file, file.name, data)
    assert list(data.iterdir()) == [arrived]


def test_a_small_parquet_file_of_gigabytes_is_refused_before_the_studio_reads_it(tmp_path, data, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    def table(length: int) -> pyarrow.Table:
        shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), ["x" * length])
        return pyarrow.table({"text": shared})

    parquet.write_table(table(20_000_000), tmp_path / "bomb.parquet", compression="zstd")
    parquet.write_table(table(2_000), tmp_path / "good.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 5_000
    monkeypatch.setattr(limited_process, "MAX_MEMORY", 3 << 30)
    with pytest.raises(Refusal, match="needs more memory"):
        receive(tmp_path / "bomb.parquet", "bomb.parquet", data)
    assert list(data.iterdir()) == []
    assert receive(tmp_path / "good.parquet", "good.parquet", data).name == "good.parquet"


def test_a_packed_file_takes_no_more_memory_than_it_may(tmp_path, data, monkeypatch):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    (tmp_path / "x.csv.xz").write_bytes(lzma.compress(b"a\n" * 1000, filters=filters))
    monkeypatch.setattr(limited_process, "MAX_MEMORY", 256 << 20)
    with pytest.raises(Refusal, match="needs more memory"):
        receive(tmp_path / "x.csv.xz", "x.csv.xz", data)
    assert list(data.iterdir()) == []
    monkeypatch.setattr(limited_process, "MAX_MEMORY", 2 << 30)
    assert receive(tmp_path / "x.csv.xz", "x.csv.xz", data).read_bytes() == b"a\n" * 1000


@pytest.mark.parametrize("top", ["", "pets/"])
def test_a_zip_of_rows_and_images_becomes_a_folder(tmp_path, data, top):
    row = {"instruction": "<image>What?", "output": "A cat.", "images": ["pictures/a.png"]}
    image = tmp_path / "a.png"
    Image.new("RGB", (6, 4)).save(image)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr(f"{top}rows.jsonl", json.dumps(row))
        archive.write(image, f"{top}pictures/a.png")
        archive.writestr("__MACOSX/x", "")
    (data / "pets").mkdir()
    arrived = receive(tmp_path / "pets.zip", "pets.zip", data)
    assert arrived.relative_to(data) == Path("pets-2/rows.jsonl")
    write_json(data / "dataset_info.json", {"pets": {"file_name": "pets-2/rows.jsonl"}})
    (example,) = examples(find(data, "pets"), lambda bad: pytest.fail(bad.text()))
    assert example["messages"][0]["images"][0].size == (6, 4)
    assert {path.name for path in data.iterdir()} == {"pets", "pets-2", "dataset_info.json"}


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_a_zip_writes_nothing_outside_of_its_folder(tmp_path, data, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("rows.jsonl", "{}")
        archive.writestr(name, "x")
    with contextlib.suppress(Refusal):
        receive(tmp_path / "x.zip", "x.zip", data)
    assert {path.name for path in data.iterdir()} <= {"rows.jsonl"}  # what leads outside is not unpacked at all
    assert not (tmp_path / "a.png").exists()


def test_a_zip_of_several_files_or_of_what_is_no_data_is_refused(tmp_path, data):
    for names, match in (
        (("a.csv", "b.csv"), "a.csv, b.csv"),
        ((), "but contains: none"),
        (("x/evil.sh",), "not a data file"),
    ):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "a,b\n1,2\n")
        with pytest.raises(Refusal, match=match):
            receive(tmp_path / "x.zip", "x.zip", data)
    assert list(data.iterdir()) == []


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4)).save(stream, "PNG")
    return stream.getvalue()


def zip_of_images(file: Path, *images: str, **texts: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name in images:
            archive.writestr(name, png())
        for name, text in texts.items():
            archive.writestr(name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl"), text)
    return file


def rows_received(file: Path, data: Path) -> tuple[str, list[list[str]]]:
    """The name of the data file, and of each row its images and what is said; * stands for an image."""
    arrived = receive(file, file.name, data)
    name = file.stem
    entry = {"file_name": str(arrived.relative_to(data))}
    rows = list(examples(dataset_of(data, name, entry), lambda bad: pytest.fail(bad.text())))
    shown = [
        [Path(image.path).relative_to(data).as_posix() for image in images_of(row)]
        + [turn["content"].replace(IMAGE_MARK, "*") for turn in row["messages"]]
        for row in rows
    ]
    return arrived.name, shown


@pytest.mark.parametrize("top", ["", "all/"])
def test_images_in_folders_named_by_label_become_rows(tmp_path, data, top):
    file = zip_of_images(tmp_path / "pets.zip", f"{top}cat/1.png", f"{top}cat/2.png", f"{top}dog/1.png")
    assert rows_received(file, data) == (
        "rows.jsonl",
        [["pets/cat/1.png", "*", "cat"], ["pets/cat/2.png", "*", "cat"], ["pets/dog/1.png", "*", "dog"]],
    )


def test_splits_of_an_image_folder_become_files_of_their_own(tmp_path, data):
    file = zip_of_images(tmp_path / "pets.zip", "train/cat/1.png", "test/dog/1.png", "train/dog/2.png")
    assert rows_received(file, data) == (
        "train.jsonl",
        [["pets/train/cat/1.png", "*", "cat"], ["pets/train/dog/2.png", "*", "dog"]],
    )
    assert (data / "pets" / "test.jsonl").read_text().count("\n") == 1


def test_metadata_next_to_images_becomes_rows(tmp_path, data):
    table = "file_name,text\na/1.png,A cat.\n2.png,A dog.\n"
    file = zip_of_images(tmp_path / "pets.zip", "a/1.png", "2.png", metadata_csv=table)
    assert rows_received(file, data)[1] == [["pets/a/1.png", "*", "A cat."], ["pets/2.png", "*", "A dog."]]
    lines = '{"file_name": "1.png", "question": "Which?", "answer": "This."}\n'
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    lines_of_test = json.dumps({"file_name": "2.png", "messages": turns})
    texts = {"train__metadata_jsonl": lines, "test__metadata_jsonl": lines_of_test}
    file = zip_of_images(tmp_path / "asked.zip", "train/1.png", "test/2.png", **texts)
    assert rows_received(file, data) == ("train.jsonl", [["asked/train/1.png", "*Which?", "This."]])
    entry = {"file_name": "asked/test.jsonl"}
    (row,) = examples(dataset_of(data, "test", entry), lambda bad: pytest.fail(bad.text()))
    assert [turn["content"] for turn in row["messages"]] == [f"{IMAGE_MARK}Who?", "Me."]


@pytest.mark.parametrize(
    ("images", "texts", "code"),
    [
        (["1.png", "2.png"], {}, "imagefolder-no-labels"),
        (["train/1.png", "test/2.png"], {}, "imagefolder-no-labels"),
        (["1.png"], {"metadata_csv": "name,text\n1.png,a\n"}, "imagefolder-no-file"),
        (["1.png"], {"metadata_csv": "file_name,size\n1.png,4\n"}, "imagefolder-no-answers"),
        (["1.png"], {"metadata_csv": "file_name,text\n"}, "imagefolder-empty"),
        (["1.png"], {"metadata_csv": "file_name,text\n1.png,a\n1.png,b,c\n"}, "row-cells"),
        (["1.png"], {"metadata_jsonl": '{"file_name": "1.png", "text": "a"}\n{broken\n'}, "row-not-json"),
        (["1.png"], {"metadata_jsonl": '{"file_name": "1.png", "text": null}'}, "imagefolder-answer-empty"),
        (["1.png"], {"metadata_csv": "file_name,text\n/etc/1.png,a\n"}, "imagefolder-outside"),
        (["1.png"], {"a__metadata_csv": "file_name,text\n../../1.png,a\n"}, "imagefolder-outside"),
        (["1.png"], {"metadata_csv": "file_name,text\n.,a\n"}, "imagefolder-outside"),
        (["1.png"], {"metadata_jsonl": '["1.png", "a"]'}, "row-type"),
    ],
)
def test_images_without_labels_are_refused(tmp_path, data, images, texts, code):
    file = zip_of_images(tmp_path / "x.zip", *images, **texts)
    with pytest.raises(Refusal) as refusal:
        receive(file, "x.zip", data)
    assert [problem.code for problem in refusal.value.problems] == [code]
    assert not (data / "x").exists()


def image_folder(folder: Path, *images: str, **texts: str) -> Path:
    """A folder with these images and texts; of a text's name, __ is a slash and the last _ the dot."""
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    for name, text in texts.items():
        file = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_broken_row_of_metadata_is_named_with_its_line(tmp_path):
    table = image_folder(tmp_path / "x", "1.png", metadata_csv="file_name,text\n1.png,a\n1.png,b,c\n")
    with pytest.raises(Refusal, match=r"metadata\.csv:3"):
        image_folders.write_rows(table)
    assert not list(table.glob("*.jsonl"))


def test_an_answer_is_taken_from_the_first_column_that_has_one(tmp_path):
    row = '{"file_name": "1.png", "caption": null, "text": " ", "label": 0}'
    (rows,) = image_folders.write_rows(image_folder(tmp_path / "x", "1.png", metadata_jsonl=row))
    assert json.loads(rows.read_text())["output"] == "0"


def test_paths_of_metadata_are_normalized(tmp_path):
    folder = image_folder(tmp_path / "x", "b/1.png", a__metadata_csv="file_name,text\n../b/./1.png,A cat.\n")
    assert json.loads(image_folders.write_rows(folder)[0].read_text())["images"] == ["b/1.png"]


def test_hidden_images_are_no_rows(tmp_path):
    folder = image_folder(tmp_path / "x", "cat/1.png", "cat/._1.png", ".thumbnails/1.png", "cat/.small/2.png")
    assert json.loads(image_folders.write_rows(folder)[0].read_text())["images"] == ["cat/1.png"]


def test_a_file_of_rows_is_never_written_over(tmp_path):
    folder = image_folder(tmp_path / "x", "train/cat/1.png", "test/cat/2.png", train_jsonl="mine")
    with pytest.raises(FileExistsError):
        image_folders.write_rows(folder)
    assert (folder / "train.jsonl").read_text() == "mine"
    assert not (folder / "test.jsonl").exists()


def test_no_file_of_rows_remains_if_another_cannot_be_written(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "x", "train/cat/1.png", "test/cat/2.png")
    replace = os.replace

    def full_disk(source: str, target: Path) -> None:
        if target.name == "train.jsonl":  # the second one
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        image_folders.write_rows(folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["test", "train"]


def test_an_image_whose_name_is_not_utf8_is_refused(tmp_path):
    folder = image_folder(tmp_path / "x", "cat/1.png", os.fsdecode(b"cat/\xff.png"))
    with pytest.raises(Refusal, match=r"cat/\\udcff\.png is not valid UTF-8"):
        image_folders.write_rows(folder)
    assert [path.name for path in folder.iterdir()] == ["cat"]


def loose(data: Path, entries: dict[str, Any] | None = None) -> set[str]:
    write_json(data / "dataset_info.json", entries or {})
    return set(DataFolder(data).loose_files())


def test_folders_that_are_no_image_folders_are_not_offered(data):
    image_folder(data / "coco", "train2017/1.png", "train2017/2.png")
    image_folder(data / "used", "a/1.png", "b/1.png")
    row = {"instruction": "<image>What?", "output": "It.", "images": ["used/a/1.png"]}
    (data / "rows.jsonl").write_text(json.dumps(row))
    assert loose(data, {"rows": {"file_name": "rows.jsonl"}}) == set()
    assert loose(data) == {"rows.jsonl", "used"}


def test_data_files_in_a_folder_too_large_to_be_seen_whole_are_still_offered(data, monkeypatch):
    monkeypatch.setattr(image_folders, "MAX_FILES_SEEN", 2)
    image_folder(data / "large", "a/1.png", "a/2.png", "b/3.png", z__rows_jsonl='{"text": "A."}')
    monkeypatch.setattr(os, "walk", lambda top, walk=os.walk: map(in_order, walk(top)))
    assert loose(data) == {"large", "large/z/rows.jsonl"}


def in_order(step: tuple[str, list[str], list[str]]) -> tuple[str, list[str], list[str]]:
    step[1].sort()
    return step


def test_metadata_and_notes_are_hidden_only_next_to_rows_made_of_images(data):
    table = "file_name,text\n1.png,A cat.\n"
    image_folder(data / "made", "a/1.png", a__metadata_csv=table, classes_txt="cat", rows_jsonl="{}")
    image_folder(data / "plain", metadata_csv=table, rows_jsonl="{}", notes_txt="A text.")
    image_folder(data, "1.png", metadata_csv=table, notes_txt="A text.")
    plain = {"plain/metadata.csv", "plain/rows.jsonl", "plain/notes.txt"}
    assert loose(data) == plain | {"metadata.csv", "notes.txt", "made/rows.jsonl"}


def test_a_link_out_of_the_data_folder_is_not_surveyed(data, tmp_path, monkeypatch):
    image_folder(tmp_path / "elsewhere", "a/1.png", "b/2.png")
    (data / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(image_folders, "survey", lambda folder: pytest.fail(f"{folder} was walked"))
    assert loose(data) == set()


def test_notes_beside_images_are_no_data(tmp_path, data):
    notes = {"pets__classes_txt": "cat\ndog\n", "pets__README_txt": "About."}
    image_folder(data / "here", "cat/1.png", "dog/2.png", classes_txt="cat", README_txt="About.")
    image_folder(data / "captions", "a/1.png", "b/2.png", a__1_txt="A cat.")
    assert loose(data) == {"here", "captions/a/1.txt"}
    file = tmp_path / "pets.zip"
    with zipfile.ZipFile(zip_of_images(file, "pets/train/cat/1.png", "pets/train/dog/2.png"), "a") as archive:
        for name, text in notes.items():
            archive.writestr(".".join(name.replace("__", "/").rsplit("_", 1)), text)
    assert rows_received(file, data)[0] == "train.jsonl"


def test_a_folder_of_images_in_the_data_folder_becomes_rows_when_this_is_asked_for(data):
    image_folder(data / "pets", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png")
    image_folder(data / "bare", "1.png")
    write_json(data / "dataset_info.json", {})
    folder = DataFolder(data)
    assert folder.loose_files() == ["pets"]
    assert [folder.image_folder(id) for id in ("file:pets", "file:bare", "set:pets", "")] == ["pets", "", "", ""]
    with pytest.raises(Refusal, match="without rows"):
        folder.select("file:pets")
    assert not list((data / "pets").glob("*.jsonl"))  # looking at it writes nothing
    assert folder.make_rows("file:pets") == ["pets/train.jsonl", "pets/test.jsonl"]
    selection = folder.select("file:pets/train.jsonl")
    rows = list(examples(selection.dataset, lambda bad: pytest.fail(bad.text())))
    assert [row["messages"][1]["content"] for row in rows] == ["cat", "dog"]
    assert set(folder.loose_files()) == {"pets/test.jsonl", "pets/train.jsonl"}
    with pytest.raises(Refusal):
        folder.make_rows("file:pets")


@pytest.mark.parametrize("content", ['{"a": [1,2', "hello world", '[{"a": '])
def test_json_of_which_no_row_can_be_read_is_refused_at_once(data: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad").write_text(content)
    with pytest.raises(Refusal, match=r"bad\.json.*JSON"):
        receive(tmp_path / "bad", "bad.json", data)
    assert not list(data.glob("bad*"))
    (tmp_path / "part").write_text('{"a": 1}\n{"a": ')  # what can be read is kept, and the rest is reported
    assert receive(tmp_path / "part", "part.jsonl", data).name == "part.jsonl"
