"""A data set of a hub comes into the data folder: from a real server on this machine, by a real child process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.data import data_jobs
from engine.data.datasets import examples, find, rows
from engine.worker.data.download import load_rows
from tests.hub import PATIENCE, Hub

pytestmark = pytest.mark.slow
QUESTIONS = [{"question": f"What comes after {n}?", "answer": f"Then {n + 1}."} for n in range(30)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a set in two splits, a set in two subsets, and one that is only a program."""
    two, subsets, program = (tmp_path / "repositories" / name for name in ("two", "subsets", "program"))
    for file, some in (("train", QUESTIONS[:20]), ("test", QUESTIONS[20:])):
        (two / "data").mkdir(parents=True, exist_ok=True)
        (two / "data" / f"{file}.jsonl").write_text("\n".join(map(json.dumps, some)))
    for subset, some in (("zh", QUESTIONS[:4]), ("en", QUESTIONS[:7])):
        (subsets / subset).mkdir(parents=True)
        (subsets / subset / "train.csv").write_text(
            "question,answer\n" + "\n".join(f"{row['question']},{row['answer']}" for row in some)
        )
    configs = "\n".join(f"- config_name: {one}\n  data_files: {one}/train.csv" for one in ("zh", "en"))
    (subsets / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    program.mkdir()
    (program / "program.py").write_text("raise SystemExit('this must never run')")
    with Hub({"org/two": two, "org/subsets": subsets, "org/program": program}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms"))
        for name, value in PATIENCE.items():
            monkeypatch.setenv(name, value)
        yield server


def fetch(tmp_path: Path, data: Path, id: str, **given: Any) -> dict[str, Any]:
    asked = {
        "data": str(data),
        "id": id,
        "hub": "huggingface",
        "subset": "",
        "split": "train",
        "into": "",
    } | given
    return data_jobs.wait(data_jobs.start(tmp_path / "saves", "download", asked))


def test_messages_of_uneven_keys_are_not_filled_up(tmp_path, data, hub):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ask, answer = (
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Sunny.", "weight": 0},
    )
    uneven = [
        {"messages": [ask, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [ask, answer | {"content": [{"type": "text", "text": "Sunny."}]}]},
        {"messages": [ask, answer]},
    ]
    folder = tmp_path / "repositories" / "two" / "part"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, uneven)))
    (made,) = fetch(tmp_path, data, "org/two", folder="part")["made"]
    first, *others = examples(find(data, made), pytest.fail)
    assert first["messages"] == [ask, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert [row["messages"][1] for row in others] == [{"role": "assistant", "content": "Sunny."}] * 2
    assert [row["weights"] for row in others] == [[0], [0]]


@pytest.mark.parametrize("which", ["huggingface", "modelscope"])
def test_a_split_of_a_set_is_fetched_and_described(tmp_path, data, hub, which):
    assert fetch(tmp_path, data, "org/two", split="test", hub=which)["made"] == ["two"]
    one = find(data, "two")
    assert one.kind == "chat"
    assert [row for _, row in rows(one, pytest.fail)] == QUESTIONS[20:]
    assert [file.name for file in data.iterdir() if file.name.startswith(".arriving")] == []


def test_an_entry_that_names_a_hub_gets_its_file_and_keeps_all_else(tmp_path, data, hub):
    info = json.loads((data / "dataset_info.json").read_text())
    info["far"] = {
        "hf_hub_url": "org/subsets",
        "subset": "zh",
        "note": "kept",
        "columns": {"prompt": "question", "response": "answer"},
    }
    (data / "dataset_info.json").write_text(json.dumps(info))
    assert find(data, "far").hub == "org/subsets"
    assert fetch(tmp_path, data, "org/subsets", subset="zh", into="far")["counts"]["far"] == 4
    one = find(data, "far")
    assert [row["answer"] for _, row in rows(one, pytest.fail)] == [f"Then {n}." for n in range(1, 5)]
    after = json.loads((data / "dataset_info.json").read_text())
    assert list(after) == list(info)
    assert (after["far"]["note"], after["far"]["hf_hub_url"]) == ("kept", "org/subsets")


@pytest.mark.parametrize(
    ("id", "given", "said"),
    [
        ("org/two", {"split": "nope"}, "nope"),
        ("org/subsets", {"subset": "fr"}, "fr"),
        ("org/program", {}, "no file that can be read here"),
        ("org/nothing", {}, "could not be downloaded"),
        ("../../etc/passwd", {}, "is not a data set ID"),
        ("", {}, "looks like org/name"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence_and_leaves_nothing(tmp_path, data, hub, id, given, said):
    before = sorted(data.iterdir())
    with pytest.raises(Refusal, match=said):
        fetch(tmp_path, data, id, **given)
    assert [file for file in sorted(data.iterdir()) if not file.name.endswith(".lock")] == before


def test_without_a_network_it_is_a_sentence(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(Refusal, match="can reach the hub"):
        fetch(tmp_path, data, "org/two")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load_rows` sets is put back."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "files",
    [
        "{secret}",
        "../secret.csv",
        "[{secret}, train.csv]",
        "file://{secret}",
        "/**/secret.csv",
        "{{train: [[/**/secret.csv]]}}",
    ],
)
def test_a_set_reads_its_own_files_and_no_others(tmp_path, files):
    """A set whose README leads to a file of the server."""
    (secret := tmp_path / "secret.csv").write_text("question,answer\nroot,$6$hash\n")
    (folder := tmp_path / "set").mkdir()
    (folder / "train.csv").write_text("question,answer\nWho?,Me.\n")
    config = f"configs:\n- config_name: default\n  data_files: {files.format(secret=secret)}"
    (folder / "README.md").write_text(f"---\n{config}\n---\n")
    with pytest.raises(Refusal, match=r"secret\.csv"):
        load_rows(folder, tmp_path / "cache", "", "train", "")
    (folder / "README.md").unlink()
    assert load_rows(folder, tmp_path / "cache", "", "train", "")["question"] == ["Who?"]


@pytest.mark.usefixtures("offline")
def test_a_link_out_of_a_set_is_not_followed(tmp_path):
    (secret := tmp_path / "secret.csv").write_text("question,answer\nroot,$6$hash\n")
    (folder := tmp_path / "set").mkdir()
    (folder / "train.csv").symlink_to(secret)
    with pytest.raises(Refusal, match=r"train\.csv"):
        load_rows(folder, tmp_path / "cache", "", "train", "")
