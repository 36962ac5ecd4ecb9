"""Tables as programs write them: the separator is found and proved, and what does not fit is told with its line."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.problems import Problem
from engine.data import csv_files, row_files
from engine.data.datasets import read_dataset_info
from engine.data.row_files import entries
from engine.launch.workspace import Workplace
from engine.spec.run_spec import RunSpec
from engine.verbs import check

HI = {"instruction": "Hi", "output": "Hello."}
HO = {"instruction": "Ho", "output": "Hey."}


def read(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    values = list(entries(file))
    for place, _ in values:  # from any place as from the start
        assert list(entries(file, place)) == values[place.row - 1 :]
    rows = [value for _, value in values if not isinstance(value, Problem)]
    return rows, [f"{value.code} {place.line}" for place, value in values if isinstance(value, Problem)]


TABLES = {
    "comma": (b"instruction,output\nHi,Hello.\nHo,Hey.\n", ","),
    "semicolon": (b"instruction;output\r\nHi;Hello.\r\nHo;Hey.\r\n", ";"),
    "tab": (b"instruction\toutput\nHi\tHello.\nHo\tHey.", "\t"),
    "bar": (b"instruction|output\nHi|Hello.\nHo|Hey.\n", "|"),
    "said in the first line": (b"sep=;\r\ninstruction;output\r\nHi;Hello.\r\nHo;Hey.\r\n", ";"),
    "said in quotes": (b'"sep=^"\ninstruction^output\nHi^Hello.\nHo^Hey.\n', "^"),
    "carriage returns": (b"instruction,output\rHi,Hello.\rHo,Hey.\r", ","),
    "line ends of all kinds": (b"instruction;output\rHi;Hello.\nHo;Hey.\r\n", ";"),
    "blank lines": (b"\n\ninstruction,output\n\nHi,Hello.\n\nHo,Hey.\n\n", ","),
    "mark": (b"\xef\xbb\xbfinstruction,output\nHi,Hello.\nHo,Hey.\n", ","),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbfinstruction;output\nHi;Hello.\nHo;Hey.\n", ";"),
    "blanks around names": (b" instruction ; output\nHi;Hello.\nHo;Hey.\n", ";"),
    "empty columns at the end": (b"instruction;output;;\nHi;Hello.;;\nHo;Hey.;;\n", ";"),
    "utf-16": ("instruction\toutput\r\nHi\tHello.\r\nHo\tHey.\r\n".encode("utf-16"), "\t"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_whatever_separates_cells_and_lines(tmp_path: Path, name: str) -> None:
    content, separator = TABLES[name]
    for suffix in (".csv", ".tsv"):
        file = tmp_path / f"t{suffix}"
        file.write_bytes(content)
        assert read(file) == ([HI, HO], [])
        assert csv_files.dialect(file).separator == separator
        assert row_files.source_of(file).doubts == ()
        assert row_files.count(file) == 2


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"x;y\n1,5;2,5\n3,5;4,5\n", [{"x": "1,5", "y": "2,5"}, {"x": "3,5", "y": "4,5"}]),
        (b'q;a\n"x;y";"z\nw"\n', [{"q": "x;y", "a": "z\nw"}]),
        (b'a,b\r"x\ry",2\r', [{"a": "x\ny", "b": "2"}]),
        (b"text\nHello; you\nthere\n", [{"text": "Hello; you"}, {"text": "there"}]),
        (b",instruction\n0,Hi\n", [{"column 1": "0", "instruction": "Hi"}]),
        (b"a,,b,\n1,2,3,\n", [{"a": "1", "column 2": "2", "b": "3"}]),
        (b"instruction,output\n", []),
        (b"", []),
    ],
)
def test_cells_are_what_they_were(tmp_path: Path, content: bytes, rows: list[dict[str, str]]) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert read(tmp_path / "t.csv") == (rows, [])


@pytest.mark.parametrize(
    ("content", "good", "told"),
    [
        (b"a;b\n1;2\n3\n4;5;6\n7;8\n", 2, ["row-cells 3", "row-cells 4"]),
        (b"a|b\n1|x\0y\n3|4\n", 1, ["row-zero 2"]),
        (b'a;b\n1;2\n3;"4\n5;6\n', 1, ["row-quote-open 3"]),
        (b'a,"b\n1,2\n', 0, ["row-quote-open None"]),
        (b"a,a\n1,2\n", 0, ["file-columns-twice None"]),
        (b"\0" * 5000, 0, ["row-zero None"]),
        (b"a,b\n" + "你好,世界\n".encode() * 9 + b"\xff,x\nfine,too\n", 10, ["row-bytes 11"]),
    ],
)
def test_what_does_not_fit_is_told_with_its_line_and_the_others_go_on(
    tmp_path: Path, content: bytes, good: int, told: list[str]
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    rows, problems = read(tmp_path / "t.csv")
    assert (len(rows), problems) == (good, told)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"a,b;c,d\n1,2;3,4\n", "table-separator-unsure"),
        (b"a;b,c\n1;2\n3;4\n5,6\n", "table-separator-unsure"),
        (b"What is the capital of France?,It is Paris.\nWhat is 2+2?,4.\n", "table-header-data"),
        (b"1,2\n3,4\n", "table-header-data"),
    ],
)
def test_what_could_not_be_proved_is_told_of_the_file(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    (doubt,) = row_files.source_of(tmp_path / "t.csv").doubts
    assert doubt.code == code
    assert doubt.text("zh") != doubt.text("en")


def test_a_table_with_old_line_ends_does_not_take_its_neighbour_along(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"instruction": "Hi", "input": "", "output": "Hello."}\n')
    (tmp_path / "mac.csv").write_bytes(b"instruction,input,output\rHi,,Hello.\rHo,,Hey.\r")
    (tmp_path / "dataset_info.json").write_text('{"one": {"file_name": "one.jsonl"}, "mac": {"file_name": "mac.csv"}}')
    sets, broken = read_dataset_info(tmp_path)
    assert not broken
    assert [one.problem for one in sets] == [None, None]


def test_a_check_from_a_shell_says_what_of_a_table_is_not_certain(
    tmp_path: Path,
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "t.csv").write_bytes(b"Who are you?;I am Athanor.\nWhat is 2+2?;4.\n")
    columns = {"prompt": "Who are you?", "response": "I am Athanor."}
    (folder / "dataset_info.json").write_text(json.dumps({"t": {"file_name": "t.csv", "columns": columns}}))
    spec = make_spec(data__dataset_dir=str(folder), data__datasets=["t"])
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    check(Namespace(spec=str(tmp_path / "spec.yaml")), replace(workplace, data=folder))
    assert "t.csv: the first line was used as column names" in capsys.readouterr().err
