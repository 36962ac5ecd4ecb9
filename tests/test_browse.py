"""Any row of a large set is at hand; sets are searched, thinned out and split, and their files stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.data import browse, derive, row_files
from engine.data.datasets import Dataset, count_rows, find, rows

LONG = 600  # seconds, so that a search does not come back before its end


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Two files of a thousand rows each in one folder; rows 700 and 1,700 are none."""
    monkeypatch.setattr(row_files, "PLACE_INTERVAL_ROWS", 64)
    monkeypatch.setattr(browse, "PLACE_INTERVAL_ROWS", 64)
    (tmp_path / "parts").mkdir()
    for part in range(2):
        lines = [
            json.dumps({"instruction": f"What is {n}?", "output": f"Nummer {n} 第{n}号"})
            for n in range(1000 * part + 1, 1000 * part + 1001)
        ]
        lines[699] = "{no row"
        (tmp_path / "parts" / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"numbers": {"file_name": "parts", "note": "kept"}}))
    return find(tmp_path, "numbers")


def said(shown: list[browse.BrowsedRow]) -> list[str]:
    return [one.example["messages"][0]["content"] if one.example else one.problem.code for one in shown]


@pytest.mark.parametrize("first", [1, 2, 64, 65, 999, 1000, 1001, 1064, 1500, 1995])
def test_a_page_begins_at_any_row(numbers, first):
    shown = browse.page(numbers, first, 10)
    assert [one.number for one in shown] == list(range(first, min(first + 10, 2001)))
    assert said(shown) == [f"What is {n}?" for n in range(first, min(first + 10, 2001))]


def test_a_row_that_is_none_is_in_its_place_with_the_reason(numbers):
    assert said(browse.page(numbers, 699, 3)) == ["What is 699?", "row-not-json", "What is 701?"]
    assert browse.page(numbers, 5000, 10) == []


def test_only_the_first_rows_are_shown_of_a_set_that_is_only_those(numbers, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"few": {"file_name": "parts", "num_samples": 70}}))
    few = find(tmp_path, "few")
    assert len(browse.page(few, 61, 50)) == 10


def test_a_search_finds_every_word_whatever_its_case_and_goes_on_where_it_stopped(numbers):
    hits, after = browse.search(numbers, "nummer 第77", 0, 3, LONG)
    assert said(hits) == ["What is 77?", "What is 770?", "What is 771?"]
    more, after = browse.search(numbers, "nummer 第77", after, 20, LONG)
    assert said(more) == [f"What is {n}?" for n in range(772, 780)]
    assert after is None
    assert browse.search(numbers, "no such thing", 0, 10, LONG) == ([], None)


def test_a_search_comes_back_after_its_time(numbers):
    hits, after = browse.search(numbers, "no such thing", 0, 10, seconds=0)
    assert (hits, after) == ([], 200)


def test_a_sample_is_spread_over_the_whole_set(numbers):
    found, total = browse.sample_entries(numbers, 640)
    taken = [place.row + 1000 * (place.file.name == "1.jsonl") for place, _ in found]
    assert total == 2000
    assert 500 <= len(taken) <= 640
    assert len(set(taken)) == len(taken)
    assert max(taken) > 1600
    assert sum(1 for _ in browse.sample_entries(numbers, 5000)[0]) == 2000


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted((folder / "parts").iterdir())}


def test_a_test_set_is_split_off_by_the_seed(numbers, tmp_path):
    before = contents(tmp_path)
    made = derive.split(tmp_path, "numbers", 0.1, 7)
    assert made.names == ["numbers-train", "numbers-test"]
    train, test = ([row["instruction"] for _, row in rows(find(tmp_path, name), pytest.fail)] for name in made.names)
    assert len(train) + len(test) == 1998
    assert abs(len(test) - 200) <= 2
    assert not set(train) & set(test)
    again = derive.split(tmp_path, "numbers", 0.1, 7)
    assert again.names == ["numbers-train-2", "numbers-test-2"]
    assert [row["instruction"] for _, row in rows(find(tmp_path, "numbers-test-2"), pytest.fail)] == test
    other = derive.split(tmp_path, "numbers", 0.1, 8)
    assert [row["instruction"] for _, row in rows(find(tmp_path, other.names[1]), pytest.fail)] != test
    assert json.loads((tmp_path / "dataset_info.json").read_text())["numbers-test"]["note"] == "kept"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan"), 0.0001])
def test_a_share_that_leaves_nothing_is_refused(numbers, tmp_path, share):
    with pytest.raises(Refusal):
        derive.split(tmp_path, "numbers", share, 1)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith((".arr", "numbers"))] == []


def test_repeated_rows_are_left_out_of_a_new_set(tmp_path):
    row = {"instruction": "Hi", "output": "Hello"}
    (tmp_path / "a.json").write_text(json.dumps([row, {**row, "output": "Hey"}, row, {"bad": 1}, {**row, "extra": 1}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}))
    made = derive.deduplicate(tmp_path, "a")
    assert made.names == ["a-unique"]
    assert dict(made.counts) == {"a-unique": 3, "left out": 2}
    found = [json.loads(line) for line in (tmp_path / "a-unique.jsonl").read_text().splitlines()]
    assert found == [row, {**row, "output": "Hey"}, {"bad": 1}]
    with pytest.raises(Refusal, match="no duplicate rows"):
        derive.deduplicate(tmp_path, "a-unique")


def test_a_text_file_is_split_into_sets_of_text(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"chapter {n}" for n in range(10)))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"book": {"file_name": "book.txt"}}))
    made = derive.split(tmp_path, "book", 0.3, 1)
    assert [find(tmp_path, name).kind for name in made.names] == ["text", "text"]
    assert count_rows(find(tmp_path, "book-test")) == 3
