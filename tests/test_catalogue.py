"""dataset_info.json is changed one entry at a time, and whatever else stands in it stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.data import dataset_info_edits
from engine.data.dataset_info_edits import ColumnMapping, entry_for_mapping, propose
from engine.data.datasets import find, read_dataset_info, rows
from engine.launch.workspace import PROJECT

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

PROPOSALS = [
    (
        {"instruction": "a", "input": "", "output": "b"},
        "chat",
        {"prompt": "instruction", "query": "input", "response": "output"},
    ),
    ({"Question": "a", "Answer": "b", "id": 3}, "chat", {"prompt": "Question", "response": "Answer"}),
    ({"问题": "a", "答案": "b"}, "chat", {"prompt": "问题", "response": "答案"}),
    ({"left": "a", "right": "b"}, "chat", {"prompt": "left", "response": "right"}),
    ({"messages": TURNS, "system": "s"}, "chat", {"messages": "messages", "system": "system"}),
    ({"dialog": json.dumps(SAID)}, "chat", {"messages": "dialog"}),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "pairs",
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    (
        {"conversations": SAID[:1], "chosen": SAID[1], "rejected": SAID[1]},
        "pairs",
        {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    ),
    (
        {"prompt": "a", "completion": "b", "label": True},
        "thumbs",
        {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    ),
    ({"prompt": "a", "completion": "b", "label": "cats"}, "chat", {"prompt": "prompt", "response": "completion"}),
    ({"content": "long", "url": "x", "date": "y"}, "text", {"prompt": "content"}),
    ({"line": "long"}, "text", {"prompt": "line"}),
]


@pytest.mark.parametrize(("row", "kind", "columns"), PROPOSALS)
def test_the_columns_of_a_file_are_guessed(row, kind, columns):
    assert propose([row]) == ColumnMapping(kind, columns)


@pytest.mark.parametrize(("row", "kind", "columns"), PROPOSALS)
def test_what_was_guessed_is_written_so_that_it_is_read_the_same(tmp_path, row, kind, columns):
    if row.get("conversations") is not None:
        row = {**row, "rejected": {"from": "gpt", "value": "No."}}
    (tmp_path / "f.json").write_text(json.dumps([row]), encoding="utf-8")
    dataset_info_edits.save(tmp_path, "f", entry_for_mapping("f.json", propose([row]), [row]))
    one = find(tmp_path, "f")
    assert one.kind == kind
    assert dataset_info_edits.mapping_of(one).columns.items() >= columns.items()
    assert [found for _, found in rows(one, pytest.fail)] == [row]


def test_speakers_with_names_of_their_own_become_tags():
    turns = [{"speaker": "patient", "text": "It hurts."}, {"speaker": "doctor", "text": "Where?"}]
    entry = entry_for_mapping("f.json", ColumnMapping("chat", {"messages": "talk"}), [{"talk": turns}])
    assert entry["formatting"] == "openai"
    assert entry["tags"] == {
        "role_tag": "speaker",
        "content_tag": "text",
        "user_tag": "patient",
        "assistant_tag": "doctor",
    }


def test_a_column_that_is_not_there_or_a_part_without_one_is_refused():
    with pytest.raises(Refusal, match=r"no column 'x'. Choose one of: a, b"):
        entry_for_mapping("f.json", ColumnMapping("chat", {"prompt": "x", "response": "b"}), [{"a": "1", "b": "2"}])
    with pytest.raises(Refusal, match="prompt \\+ chosen \\+ rejected"):
        entry_for_mapping("f.json", ColumnMapping("pairs", {"prompt": "a", "chosen": "b"}), [{"a": "1", "b": "2"}])


def test_saving_keeps_what_it_does_not_know_and_the_order(tmp_path):
    before = {
        "b": {"file_name": "b.json", "num_samples": 5, "my_note": "keep me"},
        "a": {"file_name": "a.json"},
        "strange": 7,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(before))
    row = {"q": "1", "a": "2"}
    entry = entry_for_mapping("b.json", ColumnMapping("chat", {"prompt": "q", "response": "a"}), [row], before["b"])
    assert dataset_info_edits.save(tmp_path, "renamed 新名", entry, instead_of="b") == "renamed 新名"
    after = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    assert list(after) == ["renamed 新名", "a", "strange"]
    assert after["renamed 新名"] == {
        "file_name": "b.json",
        "num_samples": 5,
        "my_note": "keep me",
        "columns": {"prompt": "q", "response": "a"},
    }
    dataset_info_edits.remove(tmp_path, "a")
    assert list(json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))) == [
        "renamed 新名",
        "strange",
    ]


def test_a_broken_file_is_told_with_line_and_column_and_never_emptied(tmp_path):
    broken = '{\n  "a": {"file_name": "a.json"},\n  "b" {}\n}'
    (tmp_path / "dataset_info.json").write_text(broken)
    for act in (
        lambda: dataset_info_edits.save(tmp_path, "c", {"file_name": "c.json"}),
        lambda: dataset_info_edits.add(tmp_path, "c", {"file_name": "c.json"}),
        lambda: dataset_info_edits.remove(tmp_path, "a"),
    ):
        with pytest.raises(Refusal, match="line 3, column 7"):
            act()
    assert (tmp_path / "dataset_info.json").read_text() == broken


@pytest.mark.parametrize("name", ["", "  ", "a,b", "two\nlines", "x" * 101, "../x", "/x", ".x", "a/../b"])
def test_what_cannot_be_a_name_is_refused(tmp_path, name):
    with pytest.raises(Refusal, match="must have 1 to 100 characters"):
        dataset_info_edits.save(tmp_path, name, {"file_name": "a.json"})


def test_a_name_may_hold_quotes_and_chinese_and_is_one_set_only(tmp_path):
    name = 'it\'s "my" 数据; rm -rf / <b>'
    assert dataset_info_edits.save(tmp_path, f" {name} ", {"file_name": "a.json"}) == name
    with pytest.raises(Refusal, match="already"):
        dataset_info_edits.save(tmp_path, name, {"file_name": "b.json"})
    assert dataset_info_edits.add(tmp_path, name, {"file_name": "b.json"}) == f"{name}-2"
    assert [one.name for one in read_dataset_info(tmp_path)[0]] == [name, f"{name}-2"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(Refusal, match="is not writable"):
        dataset_info_edits.save(tmp_path / "gone", "a", {"file_name": "a.json"})


def test_two_who_save_at_once_lose_nothing(tmp_path):
    code = (
        "import sys, pathlib; from engine.data import dataset_info_edits as catalogue\n"
        "for n in range(40): catalogue.save(pathlib.Path(sys.argv[1]), f'{sys.argv[2]}{n}', {'file_name': 'x.json'})"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), who], cwd=PROJECT) for who in ("a", "b")]
    assert [one.wait() for one in both] == [0, 0]
    assert len(json.loads((tmp_path / "dataset_info.json").read_text())) == 80


def test_the_entries_of_a_split_are_those_of_its_set(tmp_path: Path):
    entry = {
        "file_name": "a.json",
        "num_samples": 3,
        "hf_hub_url": "x/y",
        "ranking": True,
        "columns": {"prompt": "q"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    (tmp_path / "a.json").write_text("[{}]")
    assert dataset_info_edits.derived_entry(entry, find(tmp_path, "a"), "b.jsonl") == {
        "file_name": "b.jsonl",
        "ranking": True,
        "columns": {"prompt": "q"},
    }
