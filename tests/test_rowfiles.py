"""Rows are read from any place of any file, and no file, however odd or large, takes the memory with it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.problems import Problem
from engine.data import json_files, row_files, text_lines
from engine.data.row_files import entries, places
from engine.launch.workspace import PROJECT

ROWS = [{"instruction": f"问 {n}, and\nmore", "output": f'"{n}"'} for n in range(40)]


def said(file: Path) -> list[str]:
    return [row.text() for _, row in entries(file) if isinstance(row, Problem)]


def good(file: Path) -> list[dict]:
    return [row for _, row in entries(file) if not isinstance(row, Problem)]


def write(folder: Path, kind: str) -> Path:
    """The same rows in each kind of file."""
    import csv
    import io

    import pyarrow
    from pyarrow import parquet

    file = folder / f"{kind.replace(' ', '-')}{kind[kind.rindex('.') :] if '.' in kind else '.json'}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    if kind == "lines.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=16)
        return file
    table = io.StringIO()
    writer = csv.DictWriter(table, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    text = {
        "lines.jsonl": lines,
        "blank lines.jsonl": "\n" + lines.replace("\n", "\n \n"),
        "array.json": json.dumps(ROWS, indent=2),
        "one line.json": json.dumps(ROWS, ensure_ascii=False),
        "table.csv": table.getvalue(),
        "gb18030.jsonl": lines,
        "utf-16.csv": table.getvalue(),
        "utf-8-sig.json": json.dumps(ROWS),
    }[kind]
    encoding = next((one for one in ("gb18030", "utf-16", "utf-8-sig") if kind.startswith(one)), "utf-8")
    file.write_bytes(text.encode(encoding))
    return file


KINDS = (
    "lines.jsonl", "blank lines.jsonl", "array.json", "one line.json", "table.csv", "gb18030.jsonl", "utf-16.csv",
    "utf-8-sig.json", "lines.parquet",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_every_place_as_if_it_had_begun_at_the_start(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 50)
    file = write(tmp_path, kind)
    told = list(entries(file))
    assert [row for _, row in told] == ROWS
    for place, _ in told:
        assert list(entries(file, place)) == told[place.row - 1 :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_of_some_rows_are_kept_and_all_are_counted(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(row_files, "PLACE_INTERVAL_ROWS", 16)
    file = write(tmp_path, kind)
    kept, count = places(file)
    assert count == row_files.count(file) == 40
    assert [place.row for place in kept] == [1, 17, 33]
    assert [next(entries(file, place))[1] for place in kept] == [ROWS[0], ROWS[16], ROWS[32]]


def test_a_text_file_is_read_from_any_document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\nmore\n\n\ntwo\n\nthree")
    told = list(entries(file))
    assert [place.line for place, _ in told] == [1, 5, 7]
    assert list(entries(file, told[1][0])) == told[1:]


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_a_sentence_and_takes_no_memory(tmp_path):
    """The file is a hole on the disk; the reader is a process that may not have more than half of it."""
    file = tmp_path / "line.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "fine"}\n{"text": "')
        stream.seek(1 << 30, 1)
        stream.write(b'"}\n{"text": "fine, too"}')
    code = (
        "import sys, pathlib; from engine.data.row_files import entries; from engine.core.problems import Problem\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "print([row.text() if isinstance(row, Problem) else row['text'] for _, row in entries(file)])"
    )

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))

    read = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        preexec_fn=little,
    )
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith("['fine', 'line.jsonl:2: the row is longer than 64 MB, ")
    assert read.stdout.endswith("'fine, too']\n")


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.jsonl", '{"a": "b"}\n{"a": "%s"}\n{"a": "c"}', 2),
        ("a.json", '[{"a": "b"}, {"a": "%s"}, {"a": "c"}]', 1),
        ("a.csv", "a,b\n1,2\n%s,3\n4,5\n", 2),
        ("a.txt", "one\n\n%s\nmore\n\nthree", 2),
    ],
)
def test_a_row_too_long_to_be_held_is_a_sentence_in_every_kind_of_file(tmp_path, monkeypatch, name, content, count):
    monkeypatch.setattr(text_lines, "MAX_ROW_BYTES", 5000)
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 1000)
    (tmp_path / name).write_text(content % ("x" * 20_000))
    assert len(good(tmp_path / name)) == count
    (text,) = said(tmp_path / name)
    assert "longer than" in text


def test_a_quote_that_is_never_closed_does_not_swallow_the_table_in_silence(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('instruction,output\na,b\nc,"d\ne,f\ng,h\n')
    assert good(file) == [{"instruction": "a", "output": "b"}]
    assert said(file) == [
        "t.csv:3: a double quote opens here and is never closed, so everything after it is one cell. "
        "Close it, or double it if it is part of the text."
    ]


def test_ragged_rows_of_a_table_are_each_told_and_the_others_go_on(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("instruction,output\na\nb,c\nd,e,f\n")
    assert len(good(file)) == 1
    assert [text.split(": ")[0] for text in said(file)] == ["t.csv:2", "t.csv:4"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("a,b,a\n1,2,3\n")
    assert "duplicate column names: a." in said(file)[0]
    assert good(file) == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_half_a_character_is_a_bad_row_and_not_a_crash_later(tmp_path, name):
    rows = ['{"text": "fine"}', '{"text": "\\ud83d"}', '{"text": "\\ud83d\\ude00"}']
    (tmp_path / name).write_text("\n".join(rows) if name == "x.jsonl" else f"[{','.join(rows)}]")
    assert [row["text"] for row in good(tmp_path / name)] == ["fine", "😀"]
    assert "half a character" in said(tmp_path / name)[0]


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"a": ' + "[" * 100_000])
def test_json_without_end_of_depth_is_a_sentence(tmp_path, content):
    for name in ("deep.json", "deep.jsonl"):
        (tmp_path / name).write_text(content)
        assert len(said(tmp_path / name)) == 1


def test_not_a_number_is_a_number_where_text_should_be(tmp_path):
    (tmp_path / "n.jsonl").write_text('{"output": NaN}\n')
    ((_, row),) = entries(tmp_path / "n.jsonl")
    assert row_files.type_of(row["output"]) == "number"


def test_an_error_in_the_middle_of_an_array_is_told_before_the_rest_is_read(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("[{}, {] " + "x" * 1_000_000)
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 64)
    read: list[int] = []
    real = json_files.open_utf8

    def counting(path: Path, at: int = 0, encoding: str = ""):
        stream = real(path, at, encoding)
        original = stream.read
        return type(
            "Counted",
            (),
            {
                "read": lambda self, size=-1: (read.append(size), original(size))[1],
                "tell": stream.tell,
                "seekable": stream.seekable,
                "__enter__": lambda self: self,
                "__exit__": lambda self, *_: stream.close(),
            },
        )()

    monkeypatch.setattr(json_files, "open_utf8", counting)
    assert len(said(file)) == 1
    assert sum(read) < 100_000


@pytest.mark.parametrize("kind", ["lines.jsonl", "array.json", "one line.json", "gb18030.jsonl", "utf-8-sig.json"])
def test_a_file_that_breaks_off_says_how_many_rows_it_has(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    assert row_files.truncation_problem(file) is None
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 3 // 4])
    told = row_files.truncation_problem(file)
    assert told
    assert told.values["rows"] == len(good(file)) > 20
    assert f"{told.values['rows']} rows before that can be read" in told.text()
    file.write_bytes(content[:30])  # not one row: whoever looks for its columns says so
    assert row_files.truncation_problem(file) is None


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("whole.json", '[{"a": 1}, {"a": 2}, 5]', None),
        ("whole.jsonl", '{"a": 1}\n{"a": 2}\n5\n', None),
        ("whole.jsonl", '{"a": 1}\n{"a"\n{"a": 2}\n[1]\n', None),
        ("wrong.jsonl", '{"a": 1}\n{a: 2}', None),
        ("wrong.json", '[{"a": 1}, {a: 2}]', None),
        ("goes on.json", '[{"a": 1}, {"a": 2} {"a": 3}]', None),
        ("off.jsonl", '{"a": 1}\n{"a"\n{"a": 2}\n[1]\n{"a": tru', 2),
        ("off.json", '[{"a": 1}, 5, {"a": 2}, {"a": "é', 2),
        ("off.json", '[{"a": 1}, {"a": 2}', 2),
        ("off.json", '[{"a": 1}, {"a": 2},\n', 2),
    ],
)
def test_only_a_file_whose_end_is_missing_breaks_off_and_its_good_rows_are_counted(
    name: str, content: str, rows: int | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    told = row_files.truncation_problem(tmp_path / name)
    assert (told and told.values["rows"]) == rows
