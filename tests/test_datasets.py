"""Data sets are found, read and canonical, and whatever is wrong with them is said with file and line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.problems import Refusal, sentences
from engine.data import datasets, text_lines
from engine.data.datasets import count_rows, examples, read_dataset_info, rows
from engine.data.validation import check

ALPACA = {"instruction": "Translate.", "input": "cat", "output": "猫"}
CHAT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def catalogue(folder: Path, **entries: dict) -> dict[str, datasets.Dataset]:
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    found, problems = read_dataset_info(folder)
    assert not problems
    return {dataset.name: dataset for dataset in found}


def dataset(folder: Path, content: object, file_name: str = "rows.json", **entry: object) -> datasets.Dataset:
    """A data set of one file; content that is not text or bytes is written as JSON, a row per line."""
    if isinstance(content, list):
        content = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n]"
    data = content if isinstance(content, bytes) else content.encode()
    (folder / file_name).write_bytes(data)
    return catalogue(folder, rows={"file_name": file_name, **entry})["rows"]


def read(one: datasets.Dataset) -> tuple[list[dict], list[str]]:
    bad = []
    return list(examples(one, bad.append)), [problem.text() for problem in bad]


def test_an_alpaca_row_becomes_a_conversation(tmp_path):
    row = {**ALPACA, "system": "Be brief.", "history": [["Hi", "Hello"]]}
    (example,), bad = read(dataset(tmp_path, [row]))
    assert not bad
    assert [(m["role"], m["content"]) for m in example["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate.\ncat"),
        ("assistant", "猫"),
    ]
    assert example["tools"] is None


def test_columns_can_have_any_name(tmp_path):
    one = dataset(tmp_path, [{"q": "Why?", "a": "So."}], columns={"prompt": "q", "response": "a"})
    (example,), bad = read(one)
    assert not bad
    assert [m["content"] for m in example["messages"]] == ["Why?", "So."]


def test_a_sharegpt_row_with_tools_becomes_tool_calls_with_arguments_as_an_object(tmp_path):
    turns = [
        {"from": "human", "value": "Weather in Wuhan?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "武汉"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    tools = json.dumps([{"name": "weather", "parameters": {}}])
    columns = {"messages": "conversations", "tools": "tools"}
    one = dataset(tmp_path, [{"conversations": turns, "tools": tools}], formatting="sharegpt", columns=columns)
    (example,), bad = read(one)
    assert not bad
    assert [m["role"] for m in example["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert example["messages"][1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "武汉"},
    }
    assert example["tools"][0]["function"]["name"] == "weather"


def test_a_conversation_may_end_with_a_call(tmp_path):
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather"}'},
    ]
    one = dataset(tmp_path, [{"conversations": turns}], formatting="sharegpt")
    (example,), bad = read(one)
    assert not bad
    assert example["messages"][-1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    (asked,) = examples(one, pytest.fail, "prompts")
    assert (asked["messages"], asked["answer"]) == ([{"role": "user", "content": "Weather?"}], None)


def test_an_openai_row_may_hold_text_parts_and_arguments_as_text(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Done", "reasoning_content": "easy"},
    ]
    (example,), bad = read(dataset(tmp_path, [{"messages": messages}], formatting="openai"))
    assert not bad
    assert example["messages"][0] == {"role": "user", "content": "Hi"}
    assert example["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example["messages"][3]["reasoning_content"] == "easy"


def test_preferences_come_as_pairs_or_as_thumbs(tmp_path):
    pair = {"instruction": "Joke?", "input": "", "chosen": "Knock.", "rejected": "No."}
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    one = dataset(tmp_path, [pair, {**pair, "rejected": "Knock."}], ranking=True, columns=columns)
    assert one.kind == "pairs"
    (example,), bad = read(one)
    assert example["messages"] == [{"role": "user", "content": "Joke?"}]
    assert example["chosen"] == [{"role": "assistant", "content": "Knock."}]
    assert bad == ["rows.json:3: the chosen and the rejected answer are identical."]

    columns = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    one = dataset(tmp_path, [{**ALPACA, "label": False}, {**ALPACA, "label": "maybe"}], columns=columns)
    (example,), bad = read(one)
    assert example["label"] is False
    assert "'label' must be of type true/false, but is: string" in bad[0]


@pytest.mark.parametrize("columns", [None, {"prompt": "text"}])
def test_rows_with_only_a_text_are_for_pretraining(tmp_path, columns):
    one = dataset(tmp_path, [{"text": "Once upon a time."}], **({"columns": columns} if columns else {}))
    assert one.kind == "text"
    assert read(one) == ([{"text": "Once upon a time."}], [])


def test_the_documents_of_a_text_file_are_separated_by_blank_lines(tmp_path):
    one = dataset(tmp_path, "First\nstill first\n\n \nSecond\n", "book.txt")
    assert one.kind == "text"
    assert read(one)[0] == [{"text": "First\nstill first"}, {"text": "Second"}]
    assert [place.line for place, _ in rows(one, print)] == [1, 5]
    assert count_rows(one) == 2


def test_a_file_without_description_is_what_its_first_row_looks_like(tmp_path):
    assert dataset(tmp_path, [CHAT]).formatting == "sharegpt"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert dataset(tmp_path, [{"messages": turns}]).formatting == "openai"
    assert dataset(tmp_path, [ALPACA]).formatting == "alpaca"


def test_every_file_format_gives_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    plain = [{"instruction": f"问 {n}", "input": 'a "b"\nc', "output": "答, 1"} for n in range(3)]
    cells = "\n".join(f'问 {n},"a ""b""\nc","答, 1"' for n in range(3))
    lines = "\n".join(json.dumps(row) for row in plain)
    parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "rows.parquet")
    made = [
        dataset(tmp_path, plain),
        dataset(tmp_path, lines + "\n\n", "rows.jsonl"),
        dataset(tmp_path, lines, "lines-called.json"),
        dataset(tmp_path, "instruction,input,output\n" + cells + "\n", "rows.csv"),
        dataset(tmp_path, "instruction\tinput\toutput\n" + cells.replace(',"', '\t"'), "rows.tsv"),
        catalogue(tmp_path, rows={"file_name": "rows.parquet"})["rows"],
    ]
    for one in made:
        assert [row for _, row in rows(one, pytest.fail)] == plain, one.files
        assert count_rows(one) == 3, one.files
    assert [place.line for place, _ in rows(made[3], pytest.fail)] == [2, 4, 6]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
def test_chinese_text_is_read_in_any_encoding(tmp_path, encoding):
    # Longer than a word: a single one such as 猫 is the same two bytes as è in UTF-8.
    row = {**ALPACA, "output": "猫坐在垫子上，看着窗外。"}
    (example,), bad = read(dataset(tmp_path, json.dumps([row], ensure_ascii=False).encode(encoding)))
    assert not bad
    assert example["messages"][1]["content"] == row["output"]


def test_a_file_in_no_known_encoding_is_named_with_its_line(tmp_path):
    one = dataset(tmp_path, b'[\n{"output": "\xff\x81\x8d\x8f\x90\x9d"}]')
    assert one.problem.text().startswith("rows.json cannot be read as text: line 2 does not fit any of the encodings ")


def test_a_broken_catalogue_is_shown_with_line_and_column(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{\n  "a": {"file_name": "a.json"},\n  "b" {}\n}')
    found, (problem,) = read_dataset_info(tmp_path)
    assert not found
    assert (problem.values["line"], problem.values["column"]) == (3, 7)
    assert "dataset_info.json" in problem.text()
    assert "第 3 行" in problem.text("zh")


def test_a_missing_catalogue_is_said(tmp_path):
    assert read_dataset_info(tmp_path)[1][0].code == "catalogue-missing"


def test_one_broken_entry_leaves_the_others_alone(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps([ALPACA]))
    found = catalogue(
        tmp_path,
        good={"file_name": "good.json", "some_future_key": 1},
        gone={"file_name": "gone.json"},
        empty={},
        number=3,
        odd={"file_name": "good.json", "formatting": "alpca"},
        none={"file_name": "good.json", "num_samples": 0},
        tag={"file_name": "good.json", "formatting": "sharegpt", "tags": {"user_tag": ["human", "user"]}},
        hub={"hf_hub_url": "org/name", "subset": "en"},
    )
    codes = {name: one.problem and one.problem.code for name, one in found.items()}
    assert codes == {
        "good": None,
        "gone": "file-missing",
        "empty": "entry-without-file",
        "number": "entry-value",
        "odd": "entry-formatting",
        "none": "entry-value",
        "tag": "entry-value",
        "hub": None,
    }
    assert found["hub"].hub == "org/name"
    with pytest.raises(Refusal, match="on the hub"):
        count_rows(found["hub"])


@pytest.mark.parametrize("file_name", ["../secret.json", "link.json", "folder"])
def test_files_outside_of_the_data_folder_are_refused(tmp_path, file_name):
    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps([ALPACA]))
    (data / "link.json").symlink_to(secret)
    (data / "folder" / "link.json").symlink_to(secret)
    one = catalogue(data, x={"file_name": file_name})["x"]
    assert one.problem.code == "file-outside"
    assert not one.files


def test_a_folder_of_files_is_one_data_set(tmp_path):
    (tmp_path / "parts").mkdir()
    for part in "ba":
        (tmp_path / "parts" / f"{part}.jsonl").write_text(json.dumps({**ALPACA, "output": part}))
    one = catalogue(tmp_path, x={"file_name": "parts"})["x"]
    assert [row["output"] for _, row in rows(one, pytest.fail)] == ["a", "b"]
    assert count_rows(one) == 2


def test_a_folder_gives_the_files_of_the_wanted_split_and_subset(tmp_path):
    for file in ("train-00000-of-00001", "test-00000-of-00001", "my_valid", "testimony"):
        (tmp_path / "parts" / "zh").mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / f"{file}.json").write_text(json.dumps([{**ALPACA, "output": file}]))
    (tmp_path / "parts" / "zh" / "a.json").write_text(json.dumps([{**ALPACA, "output": "zh"}]))
    found = catalogue(
        tmp_path,
        plain={"file_name": "parts"},
        test={"file_name": "parts", "split": "test"},
        validation={"file_name": "parts", "split": "validation"},
        own={"file_name": "parts", "split": "testimony"},
        zh={"file_name": "parts", "subset": "zh"},
        file={"file_name": "parts/testimony.json", "split": "train"},
        none={"file_name": "parts/zh/a.json", "split": "test"},
        slice={"file_name": "parts", "split": "train[:10%]"},
        gone={"file_name": "parts", "subset": "fr"},
        out={"file_name": "parts", "subset": "../.."},
    )
    read_of = {
        name: [row["output"] for _, row in rows(one, pytest.fail)] for name, one in found.items() if not one.problem
    }
    assert read_of == {
        "plain": ["train-00000-of-00001"],
        "test": ["test-00000-of-00001"],
        "validation": ["my_valid"],
        "own": ["testimony"],
        "zh": ["zh"],
        "file": ["testimony"],
    }
    assert {name: one.problem.code for name, one in found.items() if one.problem} == {
        "none": "split-missing",
        "slice": "split-missing",
        "gone": "file-missing",
        "out": "file-outside",
    }
    assert "a.json" in found["none"].problem.text()


def test_num_samples_takes_the_first_rows(tmp_path):
    one = dataset(tmp_path, [ALPACA] * 5, num_samples=2)
    assert count_rows(one) == 2
    assert len(read(one)[0]) == 2


BAD_ROWS = [
    ({"instruction": "Hi"}, "there is no column 'output'. Available: instruction."),
    ({**ALPACA, "output": ["x"]}, "'output' must be of type string, but is: list."),
    ({**ALPACA, "output": None}, "'output' must be of type string, but is: null."),
    ({**ALPACA, "output": " \n"}, "'output' is empty."),
    ({**ALPACA, "instruction": "", "input": ""}, "'instruction' is empty."),
    ("just text", "a row must be of type object, but is: string."),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_bad_row_is_left_out_and_named_with_file_and_line(tmp_path, row, said):
    good, bad = read(dataset(tmp_path, [ALPACA, row, ALPACA]))
    assert len(good) == 2
    assert len(bad) == 1
    assert bad[0].startswith(f"rows.json:3: {said}")


IN_STRINGS = [
    ({"tools": [1]}, "'tools' must be of type [object], but is: number."),
    ({"tools": '["f"]'}, "'tools' must be of type [object], but is: string."),
    ({"tools": "[" * 100_000}, "'tools' must be of type list, but is: string."),
    ({"history": r'[["\ud83d", "Hello"]]'}, r"the text contains \ud83d, which is half a character"),
]


@pytest.mark.parametrize(("values", "said"), IN_STRINGS)
def test_json_in_a_column_is_as_mistrusted_as_the_file_around_it(tmp_path, values, said):
    good, bad = read(dataset(tmp_path, [ALPACA, {**ALPACA, **values}, ALPACA]))
    assert len(good) == 2
    assert len(bad) == 1
    assert bad[0].startswith(f"rows.json:3: {said}")


BAD_TURNS = [
    ("human", "the conversation has no answer by the assistant"),
    ("system human", "the conversation has no answer by the assistant"),
    ("gpt", "only the assistant speaks in the conversation (1 message)"),
    ("gpt gpt", "only the assistant speaks in the conversation (2 messages)"),
    ("system gpt human gpt human", "begins with an answer and ends with a message from 'user'"),
    (
        "human observation gpt",
        "message 2 is a tool result, but no earlier message from the assistant",
    ),
    ("human robot", "is 'robot'. Known roles: system, human, gpt"),
]


def spoken_by(speakers: str) -> list[dict]:
    return [{"from": speaker, "value": f"{number}"} for number, speaker in enumerate(speakers.split())]


@pytest.mark.parametrize(("speakers", "said"), BAD_TURNS)
def test_conversations_that_teach_nothing_or_are_mapped_wrongly_are_named(tmp_path, speakers, said):
    row = {"conversations": spoken_by(speakers)}
    good, (bad,) = read(dataset(tmp_path, [row], formatting="sharegpt"))
    assert not good
    assert said in bad


ANY_ORDER = {
    "human gpt human gpt": set(),
    "gpt human gpt": {"row-answer-first"},
    "system gpt human gpt": {"row-answer-first"},
    "system gpt": {"row-answer-first"},
    "human human gpt": {"row-same-speaker"},
    "human gpt gpt human gpt": {"row-same-speaker"},
    "gpt gpt human human gpt": {"row-answer-first", "row-same-speaker"},
    "human gpt system human gpt": set(),
    "human gpt observation observation gpt": set(),
    "human gpt human": {"row-open-question"},
}


@pytest.mark.parametrize("speakers", ANY_ORDER)
def test_who_speaks_after_whom_is_left_to_the_template_and_told(tmp_path, speakers):
    row = {"conversations": spoken_by(speakers)}
    (example,), bad = read(dataset(tmp_path, [row], formatting="sharegpt"))
    assert not bad
    assert [message["content"] for message in example["messages"]] == [turn["value"] for turn in row["conversations"]]
    assert {note.code for note in example.get("notes", ())} == ANY_ORDER[speakers]


def test_an_answer_that_is_judged_or_compared_is_the_last_message_and_its_prompt_is_no_answer(tmp_path):
    judged = {"conversations": spoken_by("human gpt human"), "label": True}
    columns = {"messages": "conversations", "kto_tag": "label"}
    _, (bad,) = read(dataset(tmp_path, [judged], formatting="sharegpt", columns=columns))
    assert "the last message is from 'user', but must be from: assistant" in bad
    sides = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    two = [{"conversations": spoken_by(before)} | sides for before in ("human gpt", "gpt human human")]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    one = dataset(tmp_path, two, formatting="sharegpt", ranking=True, columns=columns)
    (pair,), (bad,) = read(one)
    assert "the last message is from 'assistant', but must be from: user, tool" in bad
    assert {note.code for note in pair["notes"]} == {"row-answer-first", "row-same-speaker"}


def test_a_prompt_is_what_comes_before_the_last_answers(tmp_path):
    row = {"conversations": spoken_by("gpt human gpt human gpt gpt")}
    one = dataset(tmp_path, [row], formatting="sharegpt")
    (prompt,) = examples(one, pytest.fail, "prompts")
    assert [message["content"] for message in prompt["messages"]] == ["0", "1", "2", "3"]
    assert prompt["answer"] == "4\n\n5"
    assert {note.code for note in prompt["notes"]} == {"row-answer-first", "row-answers-joined"}
    bad = []
    alone = dataset(tmp_path, [{"conversations": spoken_by("gpt gpt")}], formatting="sharegpt")
    assert not list(examples(alone, bad.append, "prompts"))
    assert [problem.code for problem in bad] == ["row-answers-only"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("input_audio", "neither text nor an image in a message: input_audio"),
        ("image_url", "refer to 1 image (<image>, or parts of the type image), but the row has 0"),
    ],
)
def test_a_sound_or_an_image_that_is_not_there_is_not_taken_for_text(tmp_path, kind, reason):
    turns = [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": "x"}]
    _, (bad,) = read(dataset(tmp_path, [{"messages": turns}], formatting="openai"))
    assert reason in bad


def test_rows_of_an_array_in_one_line_are_told_by_number_and_column(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 7)
    bad_row = {**ALPACA, "output": 7}
    one = dataset(tmp_path, json.dumps([ALPACA, bad_row, ALPACA]) + "\n")
    column = len(json.dumps([ALPACA])) + 2
    good, bad = read(one)
    assert len(good) == 2
    assert bad == [f"rows.json:1:{column} (#2): 'output' must be of type string, but is: number."]
    assert one.files[0].read_text()[column - 1 :].startswith(json.dumps(bad_row))
    mixed = dataset(tmp_path, f"[ {json.dumps(bad_row)},\n  {json.dumps(bad_row)}, {json.dumps(bad_row)}]")
    assert [text.split(": ")[0] for text in read(mixed)[1]] == [
        "rows.json:1:3 (#1)",
        "rows.json:2",
        f"rows.json:2:{len(json.dumps(bad_row)) + 5} (#3)",
    ]


def test_a_broken_line_does_not_hide_the_rows_behind_it(tmp_path):
    good, bad = read(dataset(tmp_path, f'{json.dumps(ALPACA)}\n{{"instruction": }}\n{json.dumps(ALPACA)}', "r.jsonl"))
    assert len(good) == 2
    assert bad == ["r.jsonl:2: the line is not valid JSON at column 17: Expecting value."]


def test_a_broken_array_is_read_up_to_the_error_even_if_it_is_larger_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "BUFFER_BYTES", 7)
    content = json.dumps([ALPACA] * 3, indent=2, ensure_ascii=False)
    one = dataset(tmp_path, content)
    assert [place.line for place, _ in rows(one, pytest.fail)] == [2, 7, 12]
    lines = content.split("\n")
    lines[12] = lines[12].replace(":", "")
    good, bad = read(dataset(tmp_path, "\n".join(lines)))
    assert len(good) == 2
    assert bad[0].startswith("rows.json is not valid JSON at line 13, column 19: Expecting ':' delimiter")


def test_a_table_row_with_too_many_cells_is_named(tmp_path):
    good, bad = read(dataset(tmp_path, "instruction,output\na,b\nc,d,e\n", "t.csv"))
    assert len(good) == 1
    assert bad[0].startswith("t.csv:3: the row has 3 cells, but the header has 2.")


def test_a_report_counts_all_bad_rows_and_keeps_the_first(tmp_path):
    one = dataset(tmp_path, [ALPACA] * 3 + [{"instruction": "x"}] * 50)
    report = check(one, "chat", max_problems=5)
    assert (report.good, report.bad, len(report.problems)) == (3, 50, 5)
    assert check(one, "chat", limit=4).bad == 1


def test_placeholders_nobody_filled_in_are_a_warning(tmp_path):
    report = check(dataset(tmp_path, [{**ALPACA, "output": "I am {{ NAME }}."}]), "chat")
    assert (report.good, report.bad) == (1, 0)
    assert "{{ NAME }}" in report.warnings[0].text()


def test_an_empty_file_is_said(tmp_path):
    for number, content in enumerate(["", "[]", "\n\n"]):
        report = check(dataset(tmp_path, content, f"{number}.json"), "chat")
        assert [problem.code for problem in report.problems] == ["dataset-empty"]
        assert not report.usable


def test_data_of_the_wrong_kind_is_refused_and_a_fitting_set_recommended(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ALPACA]))
    (tmp_path / "t.txt").write_text("Text.")
    (tmp_path / "broken.json").write_text('[{"instruction": ')
    (tmp_path / "nothing.txt").write_text("\n")
    found = catalogue(
        tmp_path,
        broken={"file_name": "broken.json", "columns": {"prompt": "instruction", "response": "output"}},
        nothing={"file_name": "nothing.txt"},
        talk={"file_name": "a.json"},
        book={"file_name": "t.txt"},
        far={"hf_hub_url": "org/far"},
    )
    (problem,) = check(found["talk"], "text", datasets=list(found.values())).problems
    assert "'talk'" in problem.text()
    assert "(book)" in problem.text()
    (problem,) = check(found["book"], "chat", datasets=list(found.values())).problems
    assert "(talk)" in problem.text()


def test_a_changed_file_is_counted_again(tmp_path):
    assert count_rows(dataset(tmp_path, [ALPACA])) == 1
    assert count_rows(dataset(tmp_path, [ALPACA] * 3)) == 3


def test_the_sentences_of_both_languages_fill_in_the_same_values():
    for code, texts in sentences().items():
        placeholders = [set(re.findall(r"{(\w+)", texts[language])) for language in ("en", "zh")]
        assert placeholders[0] == placeholders[1], code


def test_reading_data_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'gradio'}"
    code = f"import sys, engine.data.datasets; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("file", ["x" * 300 + ".json", "nul\0.json"])
def test_a_file_name_that_is_none_is_a_problem_of_that_set_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"bad": {"file_name": file}}), encoding="utf-8")
    (bad,), broken = read_dataset_info(tmp_path)
    assert bad.problem is not None
    assert broken == []


def test_a_damaged_parquet_file_is_a_sentence_also_when_it_is_counted(tmp_path: Path) -> None:
    (tmp_path / "bin.parquet").write_bytes(b"\x00damaged\xff" * 50)
    (tmp_path / "dataset_info.json").write_text('{"bin": {"file_name": "bin.parquet"}}', encoding="utf-8")
    (dataset,), _ = read_dataset_info(tmp_path)
    with pytest.raises(Refusal, match="Parquet"):
        count_rows(dataset)
