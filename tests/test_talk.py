"""A conversation with several voices as a value: what each has heard, as a
file, and as rows that the Data tab takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.data.datasets import count_rows, examples, find, read_dataset_info
from engine.data.images import IMAGE_MARK, decode
from engine.data.row_images import images_of
from engine.data.validation import check
from engine.serving import conversation_tree
from engine.serving.conversation_tree import Conversation, Reply, Turn
from tests.test_images import RED, URL

BOTH = (
    Conversation()
    .add(Turn("What is 1 + 1?", "Be short.", {"base": Reply("Eleven."), "tuned": Reply("Two.")}))
    .add(Turn("And 2 + 2?", "Be short.", {"base": Reply("Twenty-two."), "tuned": Reply("Four.")}))
)
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
TOOLS = conversation_tree.parse_tools('{"name": "add", "parameters": {"type": "object"}}')
CALLED = (
    Conversation()
    .add(Turn("1 + 1?", said={"base": Reply("Eleven."), "tuned": Reply("", calls=(CALL,))}, tools=TOOLS))
    .add(Turn("2", said={"tuned": Reply("Two.")}, role="tool", tools=TOOLS))
)


def heard(told: list[conversation_tree.Message]) -> list[str]:
    return [one["content"] for one in told]


def test_each_voice_hears_what_it_said_itself_and_a_new_one_the_first_answer() -> None:
    told = conversation_tree.messages(BOTH.turns_on_path(), "tuned", "Be short.")
    assert heard(told) == ["Be short.", "What is 1 + 1?", "Two.", "And 2 + 2?", "Four."]
    assert [one["role"] for one in told] == ["system", "user", "assistant", "user", "assistant"]
    assert heard(conversation_tree.messages(BOTH.turns_on_path(), "new"))[1::2] == ["Eleven.", "Twenty-two."]


def test_who_asks_otherwise_begins_a_branch_and_the_other_one_stays() -> None:
    other = BOTH.before(1).add(Turn("And 3 + 3?", said={"tuned": Reply("Six.")}))
    assert heard(conversation_tree.messages(other.turns_on_path(), "tuned"))[-2:] == ["And 3 + 3?", "Six."]
    assert heard(conversation_tree.messages(other.to_newest_tip(1).turns_on_path(), "tuned"))[-2:] == [
        "And 2 + 2?",
        "Four.",
    ]
    assert (other.children(0), other.children(-1), other.path()) == ((1, 2), (0,), (0, 2))
    again = other.before(0).add(Turn("What is 1 + 1?", said={"tuned": Reply("2")}))
    assert (again.children(-1), again.path()) == ((0, 3), (3,))
    assert again.to_newest_tip(0).path() == (0, 2)  # by the newest of what followed
    assert json.loads(conversation_tree.jsonl(again))["messages"][-1]["content"] == "2"
    assert heard(conversation_tree.prompt(other, "tuned", 1))[1:] == ["What is 1 + 1?", "Two.", "And 2 + 2?"]


def test_a_question_whose_answers_were_lost_is_heard_by_nobody_and_asked_again_in_its_place() -> None:
    lost = BOTH.add(Turn("And 4 + 4?"))
    assert heard(conversation_tree.messages(lost.turns_on_path(), "tuned"))[-1] == "Four."
    assert lost.without_tip() == BOTH
    assert BOTH.without_tip().turns == BOTH.turns
    assert BOTH.without_tip().tip == 0


def test_who_answered_is_known_also_while_the_first_question_is_edited() -> None:
    assert BOTH.last_models() == BOTH.before(0).last_models() == ["base", "tuned"]
    assert BOTH.add(Turn("x", said={"base": Reply("y")})).last_models() == ["base"]
    assert Conversation().last_models() == []


def test_what_a_tool_answered_is_told_to_who_heard_the_call() -> None:
    told = conversation_tree.messages(CALLED.turns_on_path(), "tuned")
    assert [one["role"] for one in told] == ["user", "assistant", "tool", "assistant"]
    assert told[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    for voice in ("base", "new"):
        assert heard(conversation_tree.messages(CALLED.turns_on_path(), voice)) == ["1 + 1?", "Eleven."]
    first = Conversation().add(dataclasses.replace(CALLED.turns[0], said={"tuned": Reply("", calls=(CALL,))}))
    assert heard(conversation_tree.messages(first.add(CALLED.turns[1]).turns_on_path(), "new")) == [
        "1 + 1?",
        "",
        "2",
        "Two.",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{", "JSON"),
        ("9" * 5000, "JSON"),
        ("[" * 100_000, "JSON"),
        ("3", "list of functions"),
        ("[null]", "list of functions"),
        ('{"name": ""}', "list of functions"),
        ('[{"function": "add"}]', "list of functions"),
        ('{"function": {}}', "list of functions"),
    ],
)
def test_tools_that_are_none_are_a_sentence(text: str, told: str) -> None:
    with pytest.raises(Refusal, match=told):
        conversation_tree.parse_tools(text)


def test_tools_are_taken_bare_or_as_openai_writes_them() -> None:
    assert conversation_tree.parse_tools(json.dumps(list(TOOLS))) == TOOLS
    assert conversation_tree.parse_tools(" \n") == ()


@pytest.mark.parametrize("conversation", [BOTH, CALLED, BOTH.before(0), Conversation()])
def test_what_a_browser_has_kept_comes_back(conversation: Conversation) -> None:
    assert conversation_tree.read(json.loads(json.dumps(conversation_tree.as_plain(conversation)))) == conversation


TURN = {"question": "x", "system": "", "said": {}, "alone": False, "role": "user", "tools": [], "after": -1}


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        "",
        [3],
        {"a": 1},
        {"turns": [3], "tip": 0},
        {"turns": [TURN], "tip": 1},
        {"turns": [TURN], "tip": "last"},
        {"turns": [{**TURN, "after": 0}], "tip": 0},
        {"turns": [{**TURN, "role": "god"}], "tip": 0},
        {"turns": [{**TURN, "tools": "add"}], "tip": 0},
        {"turns": [{**TURN, "said": {"a": 1}}], "tip": 0},
        {"turns": [{**TURN, "question": 1}], "tip": 0},
        {"turns": [{**TURN, "said": {"a": {"text": "x", "tokens_per_s": "many"}}}], "tip": 0},
        {"turns": [{**TURN, "said": {"a": {"text": "x", "rating": "best"}}}], "tip": 0},
        {"turns": [{**TURN, "said": {"a": {"text": "x", "calls": [3]}}}], "tip": 0},
        {"turns": [{**TURN, "said": {"a": {"text": "x", "calls": [{"name": "f"}]}}}], "tip": 0},
    ],
)
def test_what_a_browser_made_up_is_nothing(nonsense: object) -> None:
    assert conversation_tree.read(nonsense) == Conversation()


def test_earlier_conversations_are_kept_newest_first_as_long_as_there_is_room() -> None:
    shelf: list[object] = [None, {"turns": []}]
    for number in range(conversation_tree.MAX_HISTORY + 5):
        shelf = conversation_tree.with_archived(shelf, Conversation().add(Turn(str(number), said={"a": Reply("b")})))
    assert len(shelf) == conversation_tree.MAX_HISTORY
    assert conversation_tree.read(shelf[0]).turns[0].question == str(conversation_tree.MAX_HISTORY + 4)
    assert conversation_tree.with_archived(shelf, Conversation()) == shelf
    long = Conversation().add(Turn("x" * (conversation_tree.MAX_HISTORY_CHARACTERS // 3), said={"a": Reply("b")}))
    assert len(conversation_tree.with_archived([conversation_tree.as_plain(long)] * 5, long)) == 2
    longer = Conversation().add(Turn("x" * 2 * conversation_tree.MAX_HISTORY_CHARACTERS, said={"a": Reply("b")}))
    assert [conversation_tree.read(one) for one in conversation_tree.with_archived(shelf, longer)] == [
        longer
    ]  # it is nowhere else
    unanswered = BOTH.add(Turn("Lost", alone=True))
    assert conversation_tree.jsonl(unanswered) == conversation_tree.jsonl(BOTH)


def test_ratings_become_rows_of_sets_that_are_there_and_whole(data: Path) -> None:
    before = {one.name for one in read_dataset_info(data)[0]}
    rated = conversation_tree.rate(data, BOTH, 0, "tuned", up=True)
    rated = conversation_tree.rate(data, rated, 1, "base", up=False)
    rated = conversation_tree.prefer(data, rated, 0, "tuned")
    assert rated.turns[0].said["tuned"] == Reply("Two.", rating="up", preferred=True)
    assert {one.name for one in read_dataset_info(data)[0]} - before == {
        conversation_tree.RATINGS_DATASET,
        conversation_tree.PREFERENCES_DATASET,
    }
    for name, kind, rows in (
        (conversation_tree.RATINGS_DATASET, "thumbs", 2),
        (conversation_tree.PREFERENCES_DATASET, "pairs", 1),
    ):
        dataset = find(data, name)
        assert (dataset.kind, count_rows(dataset)) == (kind, rows)
        report = check(dataset, kind)
        assert (report.good, report.bad) == (rows, 0)
    row = json.loads((data / f"{conversation_tree.PREFERENCES_DATASET}.jsonl").read_text(encoding="utf-8"))
    assert (row["chosen"]["content"], row["rejected"]["content"]) == ("Two.", "Eleven.")
    assert [one["role"] for one in row["messages"]] == ["system", "user"]


def test_ratings_of_answers_about_images_keep_the_images(data: Path) -> None:
    turn = Turn("Which colour?", said={"base": Reply("Blue."), "tuned": Reply("Red.")}, images=(URL,))
    rated = conversation_tree.rate(data, Conversation().add(turn), 0, "base", up=False)
    conversation_tree.prefer(data, rated, 0, "tuned")
    for name in (conversation_tree.RATINGS_DATASET, conversation_tree.PREFERENCES_DATASET):
        (row,) = examples(find(data, name), lambda bad: pytest.fail(bad.text()))
        assert row["messages"][0]["content"] == f"{IMAGE_MARK}Which colour?"
        (image,) = images_of(row)
        assert decode(image).getpixel((0, 0)) == RED


def test_an_answer_is_rated_once_and_pairs_need_the_same_conversation(data: Path) -> None:
    rated = conversation_tree.rate(data, BOTH, 0, "tuned", up=True)
    assert conversation_tree.rate(data, rated, 0, "tuned", up=False) == rated
    assert count_rows(find(data, conversation_tree.RATINGS_DATASET)) == 1
    with pytest.raises(Refusal, match="no other answer to the same conversation"):
        conversation_tree.prefer(data, BOTH, 1, "tuned")  # the two have heard different answers before
    for number, voice in ((0, "nobody"), (7, "base"), (-1, "base")):
        with pytest.raises(Refusal, match="no longer exists"):
            conversation_tree.rate(data, BOTH, number, voice, up=True)
    with pytest.raises(Refusal, match="empty answer"):
        conversation_tree.rate(data, Conversation().add(Turn("x", "", {"a": Reply(" ")})), 0, "a", up=True)


def test_a_turn_that_stands_alone_has_heard_nothing_and_can_be_a_pair(data: Path) -> None:
    alone = BOTH.before(1).add(dataclasses.replace(BOTH.turns[1], alone=True))
    assert heard(conversation_tree.prompt(alone, "tuned", 2)) == ["Be short.", "And 2 + 2?"]
    assert heard(conversation_tree.messages(alone.turns_on_path(), "base")) == ["And 2 + 2?", "Twenty-two."]
    assert conversation_tree.prefer(data, alone, 2, "tuned").turns[2].said["tuned"].preferred
    lines = [json.loads(line) for line in conversation_tree.jsonl(alone).splitlines()]
    assert [len(line["messages"]) for line in lines] == [3, 3, 3, 3]


@pytest.mark.parametrize("conversation", [BOTH, CALLED])
def test_the_exported_conversation_is_a_data_set_whose_form_is_found(data: Path, conversation: Conversation) -> None:
    (data / "talked.jsonl").write_text(conversation_tree.jsonl(conversation), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text())
    info["talked"] = {"file_name": "talked.jsonl"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    report = check(find(data, "talked"), "chat")
    assert (report.good, report.bad) == (2, 0)
    told = list(examples(find(data, "talked"), lambda bad: pytest.fail(bad.text())))
    assert [row["tools"] for row in told] == [list(conversation.turns[0].tools) or None] * 2


def test_a_rated_call_is_a_row_with_its_tools(data: Path) -> None:
    rated = conversation_tree.prefer(data, CALLED, 0, "tuned")
    conversation_tree.rate(data, rated, 1, "tuned", up=True)
    for name, kind in (
        (conversation_tree.RATINGS_DATASET, "thumbs"),
        (conversation_tree.PREFERENCES_DATASET, "pairs"),
    ):
        report = check(find(data, name), kind)
        assert (report.good, report.bad) == (1, 0), report
