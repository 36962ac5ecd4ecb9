"""A conversation with several voices as a value: what each has heard, as a file, and as rows that the Data tab takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from engine import talk
from engine.datasets import count_rows, find, read_catalogue
from engine.problems import Refusal
from engine.talk import Said, Turn
from engine.validation import check
from webui import answers

BOTH = (
    Turn("What is 1 + 1?", "Be short.", {"base": Said("Eleven."), "tuned": Said("Two.")}),
    Turn("And 2 + 2?", "Be short.", {"base": Said("Twenty-two."), "tuned": Said("Four.")}),
)


def test_each_voice_hears_what_it_said_itself_and_a_new_one_the_first_answer() -> None:
    heard = talk.messages(BOTH, "tuned", "Be short.")
    assert [one["content"] for one in heard] == ["Be short.", "What is 1 + 1?", "Two.", "And 2 + 2?", "Four."]
    assert [one["role"] for one in heard] == ["system", "user", "assistant", "user", "assistant"]
    assert [one["content"] for one in talk.messages(BOTH, "new")][1::2] == ["Eleven.", "Twenty-two."]


def test_what_a_browser_has_kept_comes_back_and_what_it_made_up_is_nothing() -> None:
    assert talk.read(json.loads(json.dumps(talk.kept(BOTH)))) == BOTH
    for nonsense in (
        None,
        "",
        [3],
        [{"question": "x"}],
        [{"question": "", "system": "", "said": [1]}],
        {"a": 1},
    ):
        assert talk.read(nonsense) == ()


def test_ratings_become_rows_of_sets_that_are_there_and_whole(data: Path) -> None:
    before = {one.name for one in read_catalogue(data)[0]}
    rated = talk.thumb(data, BOTH, 0, "tuned", up=True)
    rated = talk.thumb(data, rated, 1, "base", up=False)
    rated = talk.prefer(data, rated, 0, "tuned")
    assert rated[0].said["tuned"] == Said("Two.", rating="up", preferred=True)
    assert {one.name for one in read_catalogue(data)[0]} - before == {talk.THUMBS, talk.PAIRS}
    for name, kind, rows in ((talk.THUMBS, "thumbs", 2), (talk.PAIRS, "pairs", 1)):
        dataset = find(data, name)
        assert (dataset.kind, count_rows(dataset)) == (kind, rows)
        report = check(dataset, kind)
        assert (report.good, report.bad) == (rows, 0)
    row = json.loads((data / f"{talk.PAIRS}.jsonl").read_text(encoding="utf-8"))
    assert (row["chosen"]["content"], row["rejected"]["content"]) == ("Two.", "Eleven.")
    assert [one["role"] for one in row["messages"]] == ["system", "user"]


def test_an_answer_is_rated_once_and_pairs_need_the_same_conversation(data: Path) -> None:
    rated = talk.thumb(data, BOTH, 0, "tuned", up=True)
    assert talk.thumb(data, rated, 0, "tuned", up=False) == rated
    assert count_rows(find(data, talk.THUMBS)) == 1
    with pytest.raises(Refusal, match="no other answer to the same conversation"):
        talk.prefer(data, BOTH, 1, "tuned")  # the two have heard different answers before
    for number, voice in ((0, "nobody"), (7, "base"), (-1, "base")):
        with pytest.raises(Refusal, match="no longer there"):
            talk.thumb(data, BOTH, number, voice, up=True)
    with pytest.raises(Refusal, match="empty answer"):
        talk.thumb(data, (Turn("x", "", {"a": Said(" ")}),), 0, "a", up=True)


def test_a_turn_that_stands_alone_has_heard_nothing_and_can_be_a_pair(data: Path) -> None:
    alone = (BOTH[0], dataclasses.replace(BOTH[1], alone=True))
    assert talk.read(json.loads(json.dumps(talk.kept(alone)))) == alone
    assert [one["content"] for one in talk.prompt(alone, "tuned", 1)] == ["Be short.", "And 2 + 2?"]
    assert [one["content"] for one in talk.messages(alone, "base")] == ["And 2 + 2?", "Twenty-two."]
    assert talk.prefer(data, alone, 1, "tuned")[1].said["tuned"].preferred
    lines = [json.loads(line) for line in talk.jsonl(alone).splitlines()]
    assert [len(line["messages"]) for line in lines] == [3, 3, 3, 3]


def test_the_exported_conversation_is_a_data_set(data: Path) -> None:
    (data / "talked.jsonl").write_text(talk.jsonl(BOTH), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text())
    info["talked"] = {
        "file_name": "talked.jsonl",
        "formatting": "openai",
        "columns": {"messages": "messages"},
    }
    (data / "dataset_info.json").write_text(json.dumps(info))
    report = check(find(data, "talked"), "chat")
    assert (report.good, report.bad) == (2, 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain", ("", "plain", False)),
        ("<think>well</think>\n\nyes", ("well", "\n\nyes", False)),
        ("<think>still", ("still", "", True)),
        ("the template opened it</think>yes", ("the template opened it", "yes", False)),
        ("it said <think> in between", ("", "it said <think> in between", False)),
    ],
)
def test_a_thought_is_told_from_the_answer(text: str, told: tuple[str, str, bool]) -> None:
    assert answers.reasoning(text) == told
