"""A whole data set is judged before a night is spent on it: all that is bad, and what is odd about the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data import validation
from engine.data.datasets import Dataset, find
from engine.data.validation import check, repeated_rows, script_of

ALPACA = {"instruction": "Name a metal.", "input": "", "output": "Iron."}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Data sets of one file each, made from rows."""
    entries: dict[str, Any] = {}

    def made(name: str, rows: list[Any], **entry: Any) -> Dataset:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        entries[name] = {"file_name": f"{name}.jsonl", **entry}
        (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        return find(tmp_path, name)

    return made


def rows(count: int) -> list[dict[str, str]]:
    return [{**ALPACA, "instruction": f"Name metal {n}."} for n in range(count)]


def test_every_bad_row_is_told_though_only_the_first_are_kept(make):
    one = make(
        "x",
        [
            *rows(3),
            *[{"instruction": "x"}] * 7,
            {**ALPACA, "output": ["x"]},
            "text",
            {**ALPACA, "output": " "},
        ],
    )
    told = []
    report = check(
        one,
        "chat",
        max_problems=5,
        on_bad=lambda place, wrong, row: told.append((place.line, wrong.code, row)),
    )
    assert (report.good, report.bad, len(report.problems)) == (3, 10, 5)
    assert report.counts == {"row-without-column": 7, "row-value-type": 1, "row-type": 1, "row-empty": 1}
    assert [line for line, _, _ in told] == [*range(4, 14)]
    assert told[-1] == (13, "row-empty", {**ALPACA, "output": " "})


def test_what_a_row_asks_is_what_comes_before_its_last_answer_whatever_follows(make):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Потому что так надо."}]
    questions = make("asked", [{"messages": turns}])
    wrong = make("x", [{"messages": [*turns, {"role": "user", "content": "And then?"}]}])
    report = check(wrong, "chat", against=[questions])
    assert report.counts == {"row-open-question": 1, "row-leaked": 1}
    assert report.scripts == {"cyrillic": 1}


def test_rows_that_say_the_same_are_found_wherever_they_are(make):
    one = make("x", [*rows(300), {**rows(1)[0], "unused": 1}, *rows(2)])
    report = check(one, "chat")
    assert report.counts["row-repeated"] == 3
    assert [warning.text() for warning in report.warnings] == [
        "'x' has columns that are not used: unused. No model will see them; if one belongs to the row, choose it "
        "under Columns in the Data tab.",
        "x.jsonl:301: the row is the same as x.jsonl:1.",
        "x.jsonl:302: the row is the same as x.jsonl:1.",
        "x.jsonl:303: the row is the same as x.jsonl:2.",
    ]
    assert [n for n, again in enumerate(repeated_rows(one)) if again] == [300, 301, 302]


def test_rows_that_cannot_be_read_repeat_nothing(make):
    assert list(repeated_rows(make("x", ["a", "a", {"instruction": "b"}, {"instruction": "b"}]))) == [False] * 4


def test_the_same_answer_with_another_thumb_is_another_row(make):
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    one = make(
        "x",
        [{**ALPACA, "label": True}, {**ALPACA, "label": False}, {**ALPACA, "label": True}],
        columns=columns,
    )
    assert check(one, "thumbs").counts["row-repeated"] == 1


def test_what_is_measured_on_must_not_be_learned(make):
    test = make("test", [{**ALPACA, "instruction": "Name metal 7.", "output": "Another answer."}])
    report = check(make("x", rows(10)), "chat", against=[test])
    (warning,) = report.warnings
    assert warning.text().startswith("x.jsonl:8: the same question is in 'test'")
    assert report.counts["row-leaked"] == 1


@pytest.mark.parametrize(
    "written",
    ["Hi<|im_end|>", "[INST] Hi [/INST]", "<s>Hi", "<start_of_turn>user", "<｜end▁of▁sentence｜>", "<<SYS>>"],
)
def test_text_that_a_template_has_been_over_is_a_warning(make, written):
    report = check(make("x", [{**ALPACA, "output": written}, *rows(3)]), "chat")
    assert report.counts == {"row-control-token": 1}
    assert report.bad == 0


@pytest.mark.parametrize("written", ["a < b and c > d", "[1, 2]", "<div>Hi</div>", "x <| y", "{ name }", "{{}}"])
def test_ordinary_signs_are_none(make, written):
    assert check(make("x", [{**ALPACA, "output": written}]), "chat").counts == {}


def test_few_answers_in_another_script_stand_out_and_a_mixture_does_not(make):
    russian = {**ALPACA, "output": "Железо, металл."}
    report = check(make("x", [*rows(60), russian]), "chat")
    assert report.scripts == {"latin": 60, "cyrillic": 1}
    assert [warning.values["place"] for warning in report.warnings] == ["x.jsonl:61"]
    assert check(make("y", [*rows(10), *[{**russian, "instruction": str(n)} for n in range(5)]]), "chat").counts == {}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "latin"),
        ("42, 17.", ""),
        ("你好 API", "han"),
        ("これは日本語です", "kana"),
        ("안녕하세요", "hangul"),
        ("Grüße", "latin"),
        ("Привет", "cyrillic"),
        ("مرحبا", "arabic"),
        ("", ""),
        ("🎉", ""),
    ],
)
def test_the_script_of_a_text_is_that_of_most_of_its_letters(text, script):
    assert script_of(text) == script


def test_warnings_are_kept_of_each_sort_and_all_are_counted(make):
    odd = [{**ALPACA, "instruction": f"{n} {{{{NAME}}}}", "output": "</s>"} for n in range(50)]
    report = check(make("x", odd), "chat", max_problems=3)
    assert report.counts == {"row-placeholder": 50, "row-control-token": 50}
    assert len(report.warnings) == 6


def test_how_many_rows_were_read_is_told_on_the_way(make, monkeypatch):
    monkeypatch.setattr(validation, "PROGRESS_INTERVAL_ROWS", 100)
    told: list[int] = []
    check(make("x", rows(250)), "chat", on_rows=told.append)
    assert told == [0, 100, 200]


CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "entry", "columns"),
    [
        (ALPACA, {}, ""),
        ({**ALPACA, "id": 7, "source": "web", "note": ""}, {}, "id, source"),
        ({**ALPACA, "chosen": "Iron", "score": 1}, {}, "chosen"),  # that of scores is told by itself
        ({**ALPACA, "id": 7, "loss_weight": 0.5}, {"columns": {"prompt": "instruction", "response": "output"}}, "id"),
        ({"messages": CONVERSATION, "functions": [], "prompt": "Hi"}, {}, "prompt"),
        ({"messages": CONVERSATION, "functions": [{"name": "f"}], "system": "Be kind."}, {}, ""),
        ({"text": "Once.", "title": "A tale"}, {"columns": {"prompt": "text"}}, "title"),
        ({f"c{n:02}": n for n in range(30)} | ALPACA, {}, ", ".join(f"c{n:02}" for n in range(12)) + ", … (30)"),
    ],
)
def test_columns_that_nothing_is_made_of_are_named_once(make, row, entry, columns):
    wrong = make("x", [row | {"n": None}] * 3, **entry)
    report = check(wrong, wrong.kind)
    assert report.good == 3
    assert [warning.values["columns"] for warning in report.warnings if warning.code == "columns-unread"] == (
        [columns] if columns else []
    )
