"""The same rows in the spellings of many tools: read alike, what they mark is trained, and what is not text is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from engine.core.stages import Form
from engine.data.datasets import Dataset, examples, find
from engine.data.validation import check

ASK, REPLY = {"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Five, I guess."}
DOUBT, RIGHT = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No: four."}
PLAIN = [ASK, REPLY, DOUBT, RIGHT]
PAIR_ENTRY = {
    "ranking": True,
    "columns": {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
}


def dataset(folder: Path, *rows: Any, entry: dict[str, Any] | None = None, file: str = "rows.jsonl") -> Dataset:
    if file.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / file)
    else:
        (folder / file).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": file, **(entry or {})}}))
    return find(folder, "rows")


def read(folder: Path, *rows: Any, form: Form | None = None, **more: Any) -> list[dict[str, Any]]:
    """The rows in canonical form; fails if one of them cannot be read."""
    return list(examples(dataset(folder, *rows, **more), lambda bad: pytest.fail(bad.text()), form))


def refused(folder: Path, *rows: Any, form: Form | None = None, **more: Any) -> list[str]:
    bad: list[str] = []
    assert list(examples(dataset(folder, *rows, **more), lambda problem: bad.append(problem.text()), form)) == []
    return bad


def marked(**marks: Any) -> dict[str, Any]:
    """The conversation with a mark on its first answer."""
    return {"messages": [ASK, REPLY | marks, DOUBT, RIGHT]}


def test_openai_preference_rows_are_pairs_without_a_description(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    context = {"messages": [ASK], "tools": [tool], "parallel_tool_calls": True}
    row = {"input": context, "preferred_output": [RIGHT], "non_preferred_output": [REPLY]}
    [pair] = read(tmp_path, row, form="pairs")
    assert pair == {"messages": [ASK], "chosen": [RIGHT], "rejected": [REPLY], "tools": [tool]}
    [plain] = read(tmp_path, row | {"input": {"messages": [ASK]}}, form="pairs")
    assert plain["tools"] is None
    for broken in ({"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "x"}):
        assert refused(tmp_path, row | {"input": broken}, form="pairs", entry=PAIR_ENTRY)


# --------------------------------------------------------------------------------- what is to be trained

MARKS = [
    ({"weight": 0}, [0, 1]),
    ({"train": False}, [0, 1]),
    ({"training": "false"}, [0, 1]),
    ({"loss": False}, [0, 1]),
    ({"loss": 0.0}, [0, 1]),
    ({"loss_scale": 0.3}, [0.3, 1]),
    ({"loss_weight": "0.5"}, [0.5, 1]),
    ({"weight": 2, "loss_scale": 0.5}, None),
    ({"weight": 2, "train": False}, [0, 1]),
    ({"weight": None}, None),
    ({"weight": 1}, None),
    ({"train": True}, None),
    ({"weight": True}, None),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}]}, [0, 1]),
]


@pytest.mark.parametrize(("marks", "weights"), MARKS)
def test_a_mark_of_an_answer_is_its_weight_and_no_part_of_the_message(tmp_path, marks, weights):
    (row,) = read(tmp_path, marked(**marks))
    assert row["messages"] == PLAIN
    assert row.get("weights") == weights


def test_sharegpt_turns_are_marked_alike(tmp_path):
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "loss": False},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d", "weight": 1},
    ]
    assert read(tmp_path, {"conversations": turns})[0]["weights"] == [0, 1]


@pytest.mark.parametrize(
    ("columns", "weights"),
    [
        ({"loss_mask": [0, 0, 0, 1]}, [0, 1]),
        ({"loss_mask": [0, 1]}, [0, 1]),
        ({"loss_mask": "[0, 0.5, 0, 1]"}, [0.5, 1]),
        ({"loss_mask": [None, False, None, True]}, [0, 1]),
        ({"loss_mask": None}, None),
        ({"loss_mask": "", "loss_weight": ""}, None),
        ({"loss_weight": 0.25}, [0.25, 0.25]),
        ({"sample_weight": 3, "loss_mask": [0, 0, 0, 1]}, [0, 3]),
        ({"weight": 0.5}, [0.5, 0.5]),
        ({"weight": "heavy"}, None),
    ],
)
def test_a_mask_and_a_weight_of_the_row_weigh_its_answers(tmp_path, columns, weights):
    (row,) = read(tmp_path, {"messages": PLAIN, **columns})
    assert row.get("weights") == weights


def test_a_row_of_two_columns_and_a_text_can_be_weighed(tmp_path):
    assert read(tmp_path, {"instruction": "a", "output": "b", "loss_weight": 0.5})[0]["weights"] == [0.5]
    assert read(tmp_path, {"text": "Once.", "loss_weight": 0.5})[0] == {"text": "Once.", "weights": [0.5]}


def test_a_number_that_may_be_of_the_matter_is_a_weight_only_where_the_entry_says_so(tmp_path):
    row = {"question": "How heavy?", "answer": "Two kilos.", "weight": 2.0, "animal": "cat"}
    (read_so,) = read(tmp_path, row)
    assert "weights" not in read_so
    assert [note.code for note in read_so["notes"]] == ["row-weight-unclear"]
    columns = {"prompt": "question", "response": "answer", "weight": "weight"}
    assert read(tmp_path, row, entry={"columns": columns})[0]["weights"] == [2.0]


@pytest.mark.parametrize("value", ["maybe", -1, float("nan"), [1], {"a": 1}])
def test_what_is_no_weight_is_refused_with_its_place(tmp_path, value):
    (text,) = refused(tmp_path, marked(weight=value))
    assert text.startswith("rows.jsonl:1: 'messages #2.weight' is a training weight")


def test_a_mask_of_another_length_is_refused(tmp_path):
    (text,) = refused(tmp_path, {"messages": PLAIN, "loss_mask": [0, 1, 1]})
    assert "3 entries for 4 messages with 2 answers" in text


def test_marks_that_cannot_be_honoured_are_counted_and_told(tmp_path):
    elsewhere = {"messages": [ASK | {"train": True}, REPLY]}
    part = [
        {"begin_offset": 0, "end_offset": 3, "train": False},
        {"begin_offset": 4, "end_offset": 9, "train": True},
    ]
    partly = marked(train_detail=part)
    report = check(dataset(tmp_path, elsewhere, elsewhere, partly, marked(weight=0.5)), "chat")
    assert (report.good, report.bad) == (4, 0)
    wanted = {"row-mark-elsewhere": 2, "row-mark-partial": 1, "row-weighted": 1}
    assert {code: count for code, count in report.counts.items() if code in wanted} == wanted
    texts = [warning.text() for warning in report.warnings]
    assert any("messages #1 is marked for training, but is from 'user'" in text for text in texts)
    assert any("2 of 2 answers, with weights 0.5, 1" in text for text in texts)


def test_marks_mean_nothing_where_answers_are_judged_and_that_is_told(tmp_path):
    row = marked(weight=0) | {"label": True}
    (example,) = read(
        tmp_path,
        row,
        form="thumbs",
        entry={"formatting": "openai", "columns": {"messages": "messages", "kto_tag": "label"}},
    )
    assert example["messages"] == PLAIN
    assert "weights" not in example
    assert [note.code for note in example["notes"]] == ["row-marks-unused"]


# ------------------------------------------------------------------------------------------------- tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
WEATHER = {"role": "user", "content": "Weather in Rome?"}
SUNNY = {"role": "assistant", "content": "It is sunny."}


@pytest.mark.parametrize("text", [None, "", "Let me look."])
@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
def test_the_older_function_call_is_a_tool_call_and_its_result(tmp_path, text, arguments):
    call = {
        "role": "assistant",
        "content": text,
        "function_call": {"name": "weather", "arguments": arguments},
    }
    result = {"role": "function", "name": "weather", "content": "sunny"}
    (row,) = read(tmp_path, {"messages": [WEATHER, call, result, SUNNY], "functions": [FUNCTION]})
    assert row["messages"] == [
        WEATHER,
        {"role": "assistant", "content": text or "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        SUNNY,
    ]
    assert row["tools"] == [{"type": "function", "function": FUNCTION}]


def test_a_call_without_arguments_may_be_the_end(tmp_path):
    for arguments in ("{}", "", None, {}):
        call = {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "now", "arguments": arguments},
        }
        (row,) = read(tmp_path, {"messages": [WEATHER, call]})
        assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_ids_and_names_are_kept_and_several_calls_have_several_results(tmp_path):
    calls = [CALL | {"id": "a1"}, CALL | {"id": "a2"}]
    messages = [
        WEATHER,
        {"role": "assistant", "tool_calls": calls, "function_call": None, "refusal": None},
        {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "a2", "name": "weather", "content": {"sky": None}},
        SUNNY,
    ]
    (row,) = read(tmp_path, {"messages": messages})
    assert [call["id"] for call in row["messages"][1]["tool_calls"]] == ["a1", "a2"]
    assert row["messages"][2] == {"role": "tool", "content": "sunny", "tool_call_id": "a1"}
    assert row["messages"][3]["content"] == '{"sky": null}'
    assert row["messages"][3]["name"] == "weather"


def test_anthropic_blocks_are_calls_and_results(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather in Rome?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need the tool."},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "It is sunny."}]},
    ]
    (row,) = read(tmp_path, {"messages": messages})
    assert row["messages"] == [
        WEATHER,
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "I need the tool.",
            "tool_calls": [{"id": "t1", **CALL}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "t1"},
        SUNNY,
    ]


def test_nulls_that_parquet_fills_in_are_left_out_and_those_of_json_are_not(tmp_path):
    """Arrow gives all structs of a column the same keys; a JSON null may be meant."""
    calls = [[CALL], [{"type": "function", "function": {"name": "unit", "arguments": {"unit": "C"}}}]]
    rows = [{"messages": [WEATHER, {"role": "assistant", "content": None, "tool_calls": each}]} for each in calls]
    found = read(tmp_path, *rows, file="rows.parquet")
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found] == [
        {"city": "Rome"},
        {"unit": "C"},
    ]
    assert all("tool_calls" not in row["messages"][0] for row in found)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": None}}}
    (row,) = read(tmp_path, {"messages": [WEATHER, {"role": "assistant", "tool_calls": [call]}]})
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_uneven_messages_that_parquet_holds_as_json_each_are_read(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {
        "messages": [
            json.dumps(turn) for turn in (WEATHER, call, {"role": "tool", "content": "x"}, SUNNY | {"weight": 0.5})
        ]
    }
    (example,) = read(tmp_path, row | {"tools": [json.dumps(FUNCTION)]}, file="rows.parquet")
    assert [message["role"] for message in example["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert (example["messages"][1]["tool_calls"], example["weights"]) == ([CALL], [1, 0.5])
    assert example["tools"] == [{"type": "function", "function": FUNCTION}]


# ----------------------------------------------------------------------------------- contents and speakers

SPELLINGS = [
    [{"type": "text", "text": "Hi"}],
    [{"type": "input_text", "text": "Hi"}],
    [{"text": "Hi"}],
    ["H", "i"],
    {"type": "text", "text": "Hi"},
    [{"type": "text", "text": {"value": "Hi", "annotations": []}}],
    [{"type": "text", "text": "Hi", "image_url": None}],
    [{"type": "text", "text": "H"}, None, {"text": "i"}],
]


@pytest.mark.parametrize("content", SPELLINGS)
def test_a_content_in_parts_is_its_text(tmp_path, content):
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": content}, answer]})
    assert [message["content"] for message in row["messages"]] == ["Hi", "Hello"]


def test_gemini_contents_are_read(tmp_path):
    contents = [
        {"role": "user", "parts": [{"text": "Hi"}]},
        {"role": "model", "parts": [{"text": "Hel"}, {"text": "lo"}]},
    ]
    (row,) = read(tmp_path, {"contents": contents})
    assert row["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name_and_inline_thoughts_stay_where_they_are(tmp_path, key):
    (row,) = read(tmp_path, {"messages": [ASK, RIGHT | {key: "2 + 2 = 4"}]})
    assert row["messages"][1] == RIGHT | {"reasoning_content": "2 + 2 = 4"}
    inline = {"role": "assistant", "content": "<think>2 + 2</think>Four."}
    assert read(tmp_path, {"messages": [ASK, inline]})[0]["messages"][1] == inline


@pytest.mark.parametrize(
    "names",
    [("Human", "GPT"), ("user", "bot"), ("prompter", "ASSISTANT"), ("human", "model"), ("用户", "助手")],
)
def test_speakers_have_the_usual_names_in_either_format(tmp_path, names):
    for tags in (("from", "value"), ("role", "content")):
        turns = [dict(zip(tags, turn, strict=True)) for turn in zip(names, ("Hi", "Hello"), strict=True)]
        (row,) = read(tmp_path, {"conversations": turns})
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_a_developer_is_the_system_and_a_stranger_is_named(tmp_path):
    (row,) = read(tmp_path, {"messages": [{"role": "developer", "content": "Be brief."}, ASK, RIGHT]})
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "is 'narrator'" in refused(tmp_path, {"messages": [ASK, {"role": "narrator", "content": "x"}]})[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, RIGHT]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, RIGHT]},
        {"messages": [{"role": "user", "content": "<audio>What is it?"}, RIGHT], "audios": ["a.wav"]},
        {"instruction": "<video>What?", "output": "A cat.", "videos": ["a.mp4"]},
    ],
)
def test_a_video_or_a_sound_is_told_and_never_trained_as_its_placeholder(tmp_path, row):
    (text,) = refused(tmp_path, row)
    assert text.startswith("rows.jsonl:1: ")
    assert "contains something that is neither text nor an image" in text


def test_a_word_that_looks_like_a_picture_is_text_where_there_is_none(tmp_path):
    row = {"instruction": "Which HTML tag?", "output": "Use <image> in SVG.", "images": [], "image": None}
    assert read(tmp_path, row)[0]["messages"][1]["content"] == "Use <image> in SVG."


# --------------------------------------------------------------------------------- preferences and labels

HI, HELLO, AWAY = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Hello."), ("assistant", "Go away."))
)
SYSTEM = {"role": "system", "content": "Be kind."}
PAIRS = [
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."},
    {"prompt": [HI], "chosen": [HELLO], "rejected": [AWAY]},
    {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, AWAY]},
    {"chosen": [HI, HELLO], "rejected": [HI, AWAY]},
    {"prompt": [HI], "chosen": HELLO, "rejected": AWAY},
    {"prompt": json.dumps([HI]), "chosen": json.dumps([HELLO]), "rejected": json.dumps([AWAY])},
    {"messages": [HI], "chosen": [HELLO], "rejected": [AWAY]},
    {"messages": [HI], "chosen": HELLO, "rejected": AWAY},
]


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_read_with_its_prompt_beside_it_or_in_it(tmp_path, row):
    set_ = dataset(tmp_path, row)
    assert set_.kind == "pairs"
    (pair,) = read(tmp_path, row)
    assert pair == {"messages": [HI], "chosen": [HELLO], "rejected": [AWAY], "tools": None}
    assert read(tmp_path, row, form="prompts")[0]["messages"] == [HI]


def test_a_system_message_stands_before_the_prompt_once(tmp_path):
    for row in (
        {"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, AWAY]},
        {"prompt": "Hi", "chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, AWAY]},
        {"prompt": [SYSTEM, HI], "chosen": [HI, HELLO], "rejected": [HI, AWAY]},
        {"prompt": [SYSTEM], "chosen": [HI, HELLO], "rejected": [HI, AWAY]},
    ):
        assert read(tmp_path, row)[0]["messages"] == [SYSTEM, HI], row


def test_of_several_turns_the_prompt_is_what_both_begin_with(tmp_path):
    first, more = [HI, HELLO], {"role": "user", "content": "And now?"}
    (pair,) = read(tmp_path, {"chosen": [*first, more, HELLO], "rejected": [*first, more, AWAY]})
    assert pair["messages"] == [*first, more]
    assert (pair["chosen"], pair["rejected"]) == ([HELLO], [AWAY])
    (pair,) = read(tmp_path, {"chosen": [HI, HELLO, more, HELLO], "rejected": [HI, AWAY, more, HELLO]})
    assert pair["messages"] == [HI]
    assert [note.code for note in pair["notes"]] == ["row-pair-turns"]
    other = {"role": "user", "content": "Or now?"}  # where they differ, an answer has to begin
    (pair,) = read(tmp_path, {"chosen": [HI, HELLO, more, HELLO], "rejected": [HI, HELLO, other, HELLO]})
    assert (pair["messages"], len(pair["chosen"]), len(pair["rejected"])) == ([HI], 3, 3)


def test_a_pair_that_cannot_be_compared_is_refused(tmp_path):
    assert "are identical" in refused(tmp_path, {"chosen": [HI, HELLO], "rejected": [HI, HELLO]})[0]
    assert "its own answer" in refused(tmp_path, {"chosen": [HI], "rejected": [HI, AWAY]})[0]
    assert "its own answer" in refused(tmp_path, {"chosen": [HI, HELLO, HI], "rejected": [HI, AWAY]})[0]


def test_scores_are_told_to_be_unused_and_where_they_contradict(tmp_path):
    row = {
        "prompt": "Hi",
        "chosen": "Hello.",
        "rejected": "Go away.",
        "score_chosen": 1.0,
        "score_rejected": 9.0,
    }
    report = check(dataset(tmp_path, row), "pairs")
    assert report.good == 1
    assert {"scores-unread", "row-scores-disagree"} <= set(report.counts)


LABELS = [
    (True, True), (1, True), (1.0, True), ("yes", True), ("True", True), ("good", True),
    ("+1", True), ("是", True), (False, False), (0, False), (-1, False), ("no", False),
    ("FALSE", False), ("bad", False), ("0", False), ("-1", False),
]  # fmt: skip


@pytest.mark.parametrize(("label", "good"), LABELS)
def test_a_label_is_good_or_bad_in_the_usual_words(tmp_path, label, good):
    (row,) = read(tmp_path, {"prompt": [HI], "completion": [HELLO], "label": label})
    assert row == {"messages": [HI, HELLO], "label": good, "tools": None}


@pytest.mark.parametrize("label", ["maybe", 3, None, 0.5])
def test_a_label_that_is_neither_is_refused(tmp_path, label):
    columns = {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    row = {"prompt": "Hi", "completion": "Hello.", "label": label}
    assert "'label' must be of type true/false" in refused(tmp_path, row, entry={"columns": columns})[0]


@pytest.mark.parametrize("odd", ["maybe", None, "", 0.5])
@pytest.mark.parametrize("line", [1, 6, 10])
def test_an_odd_label_among_labels_is_a_bad_row_and_the_rest_stay_labelled(tmp_path, odd, line):
    labels = ["yes", "no", "no", "yes", "yes", "yes", "no", "yes", "no"]
    labels.insert(line - 1, odd)
    rows = [{"prompt": f"{n}?", "completion": f"{n}.", "label": label} for n, label in enumerate(labels)]
    labelled = dataset(tmp_path, *rows)
    report = check(labelled, "thumbs")
    assert (labelled.kind, report.good, report.bad) == ("thumbs", 9, 1)
    words = report.problems[0].text()
    assert words.startswith(f"rows.jsonl:{line}: 'label'")
    assert json.dumps(odd) in words


@pytest.mark.parametrize("classes", [["positive", "mixed", "cats"], [0, 1, 2], ["maybe", None], [0.0, 0.5, 1.0]])
def test_a_label_that_is_a_class_is_told_to_be_unused(tmp_path, classes):
    rows = [{"prompt": f"{n}?", "completion": f"{n}.", "label": classes[n % len(classes)]} for n in range(30)]
    classed = dataset(tmp_path, *rows)
    report = check(classed, "chat")
    assert (classed.kind, report.good) == ("chat", 30)
    (unread,) = [doubt for doubt in report.warnings if doubt.code == "labels-unread"]
    assert "label" in unread.values["columns"]


def test_a_prompt_and_its_completion_train_the_completion(tmp_path):
    for row in ({"prompt": "Hi", "completion": "Hello."}, {"prompt": [HI], "completion": [HELLO]}):
        assert read(tmp_path, row)[0]["messages"] == [HI, HELLO]
    (row,) = read(tmp_path, {"prompt": [ASK, REPLY, DOUBT], "completion": [RIGHT]})
    assert (row["messages"], row["weights"]) == (PLAIN, [0, 1])


# -------------------------------------------------------------------------------------- dataset_info.json


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ({"columns": {"prompt": "q", "reponse": "a"}}, "columns.response"),
        ({"columns": {"promt": "q", "response": "a"}}, "columns.prompt"),
        ({"columns": {"prompt": "q", "response": "a"}, "rankin": True}, "ranking"),
        ({"formating": "sharegpt"}, "formatting"),
        ({"formatting": "sharegpt", "tags": {"role_tags": "speaker"}}, "tags.role_tag"),
    ],
)
def test_a_misspelt_name_in_the_entry_is_told_with_the_one_that_was_meant(tmp_path, entry, meant):
    problem = dataset(tmp_path, {"q": "a", "a": "b"}, entry=entry).problem
    assert problem.code == "entry-key-misspelt"
    assert f"Did you mean '{meant}'?" in problem.text()


def test_keys_that_mean_nothing_are_told_and_keep_nobody_from_using_the_set(tmp_path):
    set_ = dataset(tmp_path, {"instruction": "a", "output": "b"}, entry={"comment": "mine", "license": "MIT"})
    assert set_.problem is None
    assert [note.text() for note in set_.notes] == [
        "Data set 'rows' in dataset_info.json has keys that are not used here: comment, license. They are ignored."
    ]
    assert check(set_, "chat").counts["entry-keys-unread"] == 1


def test_a_guess_is_held_against_more_than_the_first_row(tmp_path):
    talk, other = {"messages": [ASK, REPLY]}, {"instruction": "a", "output": "b"}
    set_ = dataset(tmp_path, talk, talk, other)
    assert (set_.formatting, set_.notes[0].values["unlike"], set_.notes[0].values["rows"]) == ("openai", 1, 3)
    assert "1 of the first 3 do not fit" in set_.notes[0].text()
    assert dataset(tmp_path, talk, talk).notes == ()


def test_folder_and_subset_are_those_of_a_hubs_repository_and_mean_nothing_of_a_file(tmp_path):
    (tmp_path / "copy" / "data" / "en").mkdir(parents=True)
    row = {"instruction": "a", "output": "b"}
    for file in ("copy/top.jsonl", "copy/data/zh.jsonl", "copy/data/en/en.jsonl", "file.jsonl"):
        (tmp_path / file).write_text(json.dumps(row | {"output": file}))
    entries = {
        "top": {"file_name": "copy"},
        "folder": {"file_name": "copy", "folder": "data"},
        "subset": {"file_name": "copy", "folder": "data", "subset": "en"},
        "file": {"file_name": "file.jsonl", "folder": "data", "subset": "en"},
        "hub": {"hf_hub_url": "org/set", "folder": "data", "subset": "en"},
        "out": {"file_name": "copy", "folder": "../.."},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    files = {name: [str(file.relative_to(tmp_path)) for file in find(tmp_path, name).files] for name in entries}
    assert files == {
        "top": ["copy/top.jsonl"],
        "folder": ["copy/data/zh.jsonl"],
        "subset": ["copy/data/en/en.jsonl"],
        "file": ["file.jsonl"],
        "hub": [],
        "out": [],
    }
    assert (find(tmp_path, "hub").folder, find(tmp_path, "hub").subset) == ("data", "en")
    assert find(tmp_path, "out").problem.code == "file-outside"


def test_places_in_a_row_are_counted_from_1_wherever_they_are_told(tmp_path):
    hi, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    texts = {
        "messages #2.content": [hi, {"role": "assistant", "content": 5}],
        "messages #1.role": [{"role": "narrator", "content": "Once."}],
        "message 2": [hi, {"role": "tool", "content": "x"}, answer],
        "there is nothing to learn": [],
    }
    entry = {"formatting": "openai"}
    for sentence, messages in texts.items():
        text, _ = refused(tmp_path, *[{"messages": messages}] * 2, entry=entry)
        assert sentence in text
    text, _ = refused(tmp_path, *[{"messages": []}] * 2, form="prompts", entry=entry)
    assert text == "rows.jsonl:1: the conversation has no messages."
