"""JSON in every layout that people bring: read where its meaning is clear, else one sentence about the whole file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Problem
from engine.data import chunks, json_layout, row_files, text_lines
from engine.data.chunks import InvalidByteRange
from engine.data.row_files import entries

HI = {"instruction": "Hi", "output": "Hello."}
HO = {"instruction": "Ho", "output": 'Hey, "you" 你好 {}[]'}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def dump(value: Any, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **how)


READ = {
    "under data": (dump({"data": [HI, HO]}, indent=2), [HI, HO]),
    "under rows, beside numbers": (dump({"version": 1, "rows": [HI, HO], "count": 2}), [HI, HO]),
    "under train": (dump({"train": [HI, HO]}), [HI, HO]),
    "under examples": (dump({"examples": [HI, HO], "license": "MIT"}, indent=1), [HI, HO]),
    "under a key of its own": (dump({"my_rows": [HI, HO]}), [HI, HO]),
    "a data set server's answer": (
        dump(
            {
                "features": [{"feature_idx": 0, "name": "instruction"}, {"feature_idx": 1, "name": "output"}],
                "rows": [{"row_idx": 0, "row": HI, "truncated_cells": []}, {"row_idx": 1, "row": HO}],
                "num_rows_total": 2,
            }
        ),
        [HI, HO],
    ),
    "columns by index": (dump({key: {"0": HI[key], "1": HO[key]} for key in HI}), [HI, HO]),
    "columns as lists": (dump({key: [HI[key], HO[key]] for key in HI}, indent=4), [HI, HO]),
    "one column": (dump({"text": ["a", "b"]}), [{"text": "a"}, {"text": "b"}]),
    "split": (
        dump({"columns": list(HI), "index": [0, 1], "data": [list(HI.values()), list(HO.values())]}),
        [HI, HO],
    ),
    "table": (dump({"schema": {"fields": [{"name": "instruction"}]}, "data": [HI, HO]}), [HI, HO]),
    "rows by number": (dump({"0": HI, "1": HO}), [HI, HO]),
    "rows by name": (dump({"first": HI, "second": HO}, indent=2), [HI, HO]),
    "a pretty row": (dump(HI, indent=2), [HI]),
    "a pretty conversation": (dump({"messages": TURNS}, indent=2), [{"messages": TURNS}]),
    "a pretty row with tools": (
        dump({"messages": TURNS, "tools": [{"name": "f"}]}, indent=2),
        [{"messages": TURNS, "tools": [{"name": "f"}]}],
    ),
    "a pair in lists": (
        dump({"chosen": TURNS, "rejected": TURNS[:1]}, indent=1),
        [{"chosen": TURNS, "rejected": TURNS[:1]}],
    ),
    "several pretty rows": (dump(HI, indent=2) + "\n" + dump(HO, indent=2) + "\n", [HI, HO]),
    "several pretty conversations": (dump({"messages": TURNS}, indent=2) * 3, [{"messages": TURNS}] * 3),
    "a line, then a pretty row": (dump(HI) + "\n" + dump(HO, indent=2), [HI, HO]),
    "rows on one line": (dump(HI) + " " + dump(HO), [HI, HO]),
    "rows with commas between": (dump(HI) + ",\n" + dump(HO) + ",\n", [HI, HO]),
    "lines that end in CR": (dump(HI) + "\r" + dump(HO) + "\r", [HI, HO]),
    "lines": (dump(HI) + "\n\n" + dump(HO), [HI, HO]),
    "a list": (dump([HI, HO], indent=1), [HI, HO]),
    "no rows": (dump({"data": [], "total": 0}), []),
}


def by_reader(file: Path) -> tuple[list[Any], list[str]]:
    values = [value for _, value in entries(file)]
    return (
        [value for value in values if not isinstance(value, Problem)],
        [value.code for value in values if isinstance(value, Problem)],
    )


def by_blocks(file: Path) -> tuple[list[Any], list[str]]:
    rows: list[Any] = []
    bad: list[Problem] = []
    source: Any = chunks.blocks(file)
    while source:
        current, source = source, None
        for block in current:
            wrong: list[Problem] = []
            try:
                some = [row for _, row in block.rows(wrong.append)]
            except InvalidByteRange:
                source = chunks.row_by_row(file, len(rows) + len(bad))
                break
            rows += some
            bad += wrong
    return rows, [problem.code for problem in bad]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", READ)
def test_a_layout_with_a_clear_meaning_is_read_from_any_row_and_by_blocks(
    tmp_path: Path, name: str, encoding: str, suffix: str
) -> None:
    text, rows = READ[name]
    file = tmp_path / f"x{suffix}"
    file.write_bytes(text.encode(encoding))
    read = list(entries(file))
    assert [row for _, row in read] == rows
    for place, _ in read:
        assert list(entries(file, place)) == read[place.row - 1 :]
    assert by_blocks(file) == (rows, [])
    assert row_files.count(file) == len(rows)
    assert row_files.truncation_problem(file) is None


SAID = {
    "several lists": (dump({"train": [HI], "test": [HO]}), "file-json-several-lists", 0),
    "uneven columns": (dump({"a": ["x"], "b": ["y", "z"]}), "file-json-uneven", 0),
    "a list per line": (f"{dump(TURNS)}\n{dump(TURNS)}\n", "file-json-lists", 0),
    "text": ("Dear all,\nthis is text.\n" * 50, "file-no-json", 0),
    "a page": ("<html>\n<body>404</body>\n</html>\n", "file-no-json", 0),
    "a table": ("a,b\n1,2\n3,4\n", "file-no-json", 0),
    "strings": ('"a"\n"b"\n"c"\n', "file-json-no-objects", 0),
    "a broken pretty row": ('{\n "a": 1,\n "b": oops,\n "c": 3\n}\n', "file-no-json", 0),
    "a list and more": (dump([HI, HO]) + "\n" + dump([HO]), "file-json-more", 2),
    "a list under a key, and another": ('{"a": [{"b": 1}], "c": [{"d": 1}, oops', "row-not-json", 0),
    "a wrapped list that breaks off": (dump({"data": [HI, HO, HI]}, indent=1)[:-30], "file-broken-json", 2),
    "a wrapped list with an error": (dump({"data": [HI, HO]}, indent=1).replace('"Ho"', "Ho"), "file-broken-json", 1),
    "pretty rows that break off": (dump(HI, indent=1) + dump(HO, indent=1)[:-10], "file-broken-json", 1),
    "depth without end": ('{\n"a":' * 50_000, "file-no-json", 0),
    "a number without end": ('{"a": ' + "9" * 5000 + "}", "row-not-json", 0),
    "a number without end in a list": ('[{"a": ' + "9" * 5000 + "}]", "file-broken-json", 0),
}


@pytest.mark.parametrize("name", SAID)
def test_what_has_no_clear_meaning_is_one_sentence_about_the_whole_file(tmp_path: Path, name: str) -> None:
    text, code, rows = SAID[name]
    for suffix in (".json", ".jsonl"):
        file = tmp_path / f"x{suffix}"
        file.write_text(text, encoding="utf-8")
        read, codes = by_reader(file)
        assert (codes, len(read)) == ([code], rows)
        assert by_blocks(file) == (read, codes)
        assert all(isinstance(value, dict) or value.text("zh") != value.text("en") for _, value in entries(file))


def test_an_object_longer_than_a_row_is_read_by_its_list_and_never_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "MAX_ROW_BYTES", 5000)
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 1000)
    file = tmp_path / "x.json"
    rows = [{"text": f"row {number}"} for number in range(1000)]
    for indent in (None, 2):
        file.write_text(dump({"name": "x", "data": rows, "size": 1000}, indent=indent))
        json_layout._layout.cache_clear()
        assert by_reader(file) == (rows, [])
    file.write_text(dump({"data": rows, "test": rows[:3]}))
    json_layout._layout.cache_clear()
    assert by_reader(file) == (rows, ["file-json-more-wrapped"])  # seen only at the end, and told there
    file.write_text(dump({"text": {str(number): "x" * 9 for number in range(1000)}}))
    json_layout._layout.cache_clear()
    assert by_reader(file) == ([], ["file-json-large"])


def test_a_byte_that_is_no_character_costs_its_row_and_no_other(tmp_path: Path) -> None:
    rows = [{"text": f"你好世界 {number}"} for number in range(30)]
    for text in (
        dump(rows, indent=1),
        "\n".join(map(dump, rows)),
        dump({"data": rows}),
        "\n".join(dump(row, indent=1) for row in rows),
    ):
        file = tmp_path / "x.json"
        file.write_bytes(text.encode().replace("界 7".encode(), b"\xff 7"))
        os.utime(file, ns=(len(text), len(text)))  # another version, whatever the clock says
        read = list(entries(file))
        assert [row for _, row in read if isinstance(row, dict)] == rows[:7] + rows[8:]
        ((_, problem),) = [entry for entry in read if isinstance(entry[1], Problem)]
        assert "bytes that are not UTF-8" in problem.text()
        assert by_blocks(file) == by_reader(file)
