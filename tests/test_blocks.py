"""Files in blocks hold what the readers find in them, row for row and problem for problem."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Problem
from engine.data import chunks, row_files
from engine.data.chunks import ByteRange, InvalidByteRange

ROWS = [{"instruction": f'{n} 你好 "[{{,}}]" \\ }},{{', "output": "x" * (n % 37)} for n in range(300)]
CHATS = [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(200)]
MIXED = [*ROWS[:50], 5, *ROWS[50:120], "text", None, *ROWS[120:150], [1]]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(chunks, "MAX_BLOCK_ROWS", 30)
    monkeypatch.setattr(chunks, "MAX_ROW_BYTES", 20_000)


def by_reader(file: Path) -> tuple[list[Any], list[str]]:
    bad: list[Problem] = []
    found = row_files.valid_rows(row_files.entries(file), bad.append)
    return [row for _, row in found], [_told(one) for one in bad]


def by_blocks(file: Path) -> tuple[list[Any], list[str], int]:
    """As the preparation reads: block by block, and row by row from one that is broken on."""
    rows: list[Any] = []
    bad: list[Problem] = []
    entries = byte_ranges = 0
    source = chunks.blocks(file)
    while source:
        given, source = source, None
        for block in given:
            found: list[Problem] = []
            try:
                some = [row for _, row in block.rows(found.append)]
            except InvalidByteRange:
                source = chunks.row_by_row(file, entries)
                break
            byte_ranges += isinstance(block, ByteRange)
            rows += some
            bad += found
            entries += len(some) + len(found)
    return rows, [_told(one) for one in bad], byte_ranges


def _told(one: Problem) -> str:
    place = str(one.values.get("place", "")).split(" ")[0]  # without the number of the row
    return f"{one.code} {place} {one.values.get('line', '')}"


WRITTEN: dict[str, Callable[[list[Any]], str]] = {
    "one_line.json": lambda rows: json.dumps(rows, ensure_ascii=False),
    "tight.json": lambda rows: json.dumps(rows, separators=(",", ":")),
    "indented.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=4),
    "row_a_line.json": lambda rows: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
    "lines.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "lines.json": lambda rows: "\r\n\r\n".join(json.dumps(row) for row in rows) + "\r\n",
}


@pytest.mark.parametrize("rows", [ROWS, CHATS, MIXED, ROWS[:1], []], ids=["alpaca", "chats", "mixed", "one", "none"])
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_blocks_hold_what_the_reader_finds(tmp_path: Path, name: str, rows: list[Any], encoding: str) -> None:
    file = tmp_path / name
    file.write_bytes(WRITTEN[name](rows).encode(encoding))
    found, bad, byte_ranges = by_blocks(file)
    assert (found, bad) == by_reader(file)
    assert found == [row for row in rows if isinstance(row, dict)]
    if encoding.startswith("utf-8") and len(rows) > 100:
        assert byte_ranges > 3


def test_rows_that_begin_in_different_ways_are_all_read(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [
        dict(chance.sample(list({"a": 1, "b": '},{"a"', "c": [{"a": 2}, {"a": 3}]}.items()), 3)) for _ in range(500)
    ]
    file = tmp_path / "mixed.json"
    for written in (json.dumps(rows), json.dumps(rows, indent=1)):
        file.write_text(written)
        assert by_blocks(file)[0] == rows
    file.write_text(json.dumps([rows[0], *({"z": row} for row in rows)]))  # nothing like the first row comes again
    assert by_blocks(file)[0][1:] == [{"z": row} for row in rows]


@pytest.mark.parametrize("at", [0, 150, 299])
@pytest.mark.parametrize("name", [name for name in WRITTEN if "lines" not in name])
def test_a_broken_array_is_told_with_its_line_and_gives_the_rows_before(tmp_path: Path, name: str, at: int) -> None:
    file = tmp_path / name
    whole = WRITTEN[name](ROWS)
    cut = whole.index(f'"{at} ')
    file.write_text(whole[:cut] + whole[cut + 1 :])
    found, bad, _ = by_blocks(file)
    assert (found, bad) == by_reader(file)
    assert found == ROWS[:at]
    assert len(bad) == 1


def test_a_broken_line_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    lines[7], lines[100], lines[200] = '{"a": 1', '{"a": 1}, {"b": 2}', '{"instruction": "half \\ud83d"}'
    file.write_text("\n".join(lines))
    found, bad, _ = by_blocks(file)
    assert (found, bad) == by_reader(file)
    assert [one.split()[1] for one in bad] == ["lines.jsonl:8", "lines.jsonl:101", "lines.jsonl:201"]
    assert len(found) == 297


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "text.txt", "table.parquet"])
def test_other_formats_are_read_row_by_row(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / name
    if name == "table.parquet":
        parquet.write_table(pa.table({"text": [f"row {n}" for n in range(100)]}), file)
    elif name == "text.txt":
        file.write_text("\n\n".join(f"document {n}\nline" for n in range(100)))
    else:
        mark = "\t" if name.endswith("tsv") else ","
        file.write_text(f"a{mark}b\n" + "".join(f'{n}{mark}"x\ny"\n' for n in range(100)) + f"1{mark}2{mark}3\n")
    found, bad, _ = by_blocks(file)
    assert (found, bad) == by_reader(file)
    assert len(found) == 100


def test_a_block_of_long_rows_holds_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    said = [[{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 300}]] * 20
    parquet.write_table(pa.table({"messages": said}), tmp_path / "long.parquet")
    assert [len(block.entries) for block in chunks.blocks(tmp_path / "long.parquet")] == [2] * 10
