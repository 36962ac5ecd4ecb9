"""What makes an answer good: each reward function on the answers that are easily got wrong."""

from __future__ import annotations

import itertools
import math
import textwrap
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core.problems import Problem, Refusal
from engine.worker.training.rewards import Answer, check_references, last_number, score_function


def answer(text: str = "", wanted: str | None = None, tokens: int = 1) -> Answer:
    return Answer([{"role": "user", "content": "How much is it?"}], [1, 2], text, [3] * tokens, wanted)


def score(reward: str, *answers: Answer, **settings: Any) -> list[float | None]:
    return score_function(reward, SimpleNamespace(**settings), None)(answers)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", "1234.5"),
        ("-3", "-3"),
        ("42%", "42"),
        ("The answer is 42.", "42"),
        ("答案是42。", "42"),
        ("3-5", "5"),
        ("−7", "-7"),
        ("+7", "7"),
        (".5", ".5"),
        ("2e-3", "0.002"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("１２", "12"),
        ("12 of 1,000,000", "1000000"),
        ("1.50", "1.5"),
        ("x=7", "7"),
    ],
)
def test_the_last_number_of_a_text_is_found_as_people_write_it(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "四十二", "none", "-", ",", "."])
def test_a_text_without_digits_has_no_number(text: str) -> None:
    assert last_number(text) is None


def test_numeric_compares_values_and_leaves_out_what_has_nothing_to_compare() -> None:
    asked = [
        answer("so 1,000.0", "1000"),
        answer("999", "1000"),
        answer("none", "1000"),
        answer("1", None),
        answer("1", "one"),
    ]
    assert score("numeric", *asked) == [1, 0, 0, None, None]


def test_exact_forgives_white_space_and_nothing_else() -> None:
    asked = [
        answer(" a  b\n", "a b"),
        answer("ab", "a b"),
        answer("A b", "a b"),
        answer("", ""),
        answer("a", None),
    ]
    assert score("exact", *asked) == [1, 0, 0, 1, None]


def test_format_wants_the_whole_answer_over_all_its_lines() -> None:
    pattern = r"<think>.*</think>\s*\S.*"
    asked = ["<think>a\nb</think>\nc", "x <think>a</think> c", "<think>a</think>", "<think>a"]
    assert score("format", *map(answer, asked), reward_pattern=pattern) == [1, 0, 0, 0]
    assert score("format", answer("中文"), answer("中文!"), reward_pattern=r"\p{Han}+") == [1, 0]


def test_a_pattern_that_would_take_years_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert score("format", answer("a" * 40 + "!"), reward_pattern=r"(?:(a|aa)+)+\1b|(a+)+$") == [0]
    assert "took longer" in capsys.readouterr().out


def test_length_is_smooth_and_best_at_just_as_many_tokens() -> None:
    scores = score("length", *(answer(tokens=n) for n in range(21)), reward_length=10)
    assert scores[10] == 1
    assert scores[0] == scores[20] == pytest.approx(1 / math.e)
    steps = [after - before for before, after in itertools.pairwise(scores)]
    assert all(step > 0 for step in steps[:10])
    assert all(step < 0 for step in steps[10:])


# ------------------------------------------------------------------------------------------ the file


def file_with(folder: Path, source: str) -> Path:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def refused(path: Path, *answers: Answer) -> Problem:
    with pytest.raises(Refusal) as caught:
        score("file", *(answers or (answer("x"),)), reward_file=str(path))
    (found,) = caught.value.problems
    assert found.field == "stage.reward_file"
    assert str(path) in found.text("en")
    assert str(path) in found.text("zh")
    return found


def test_the_file_gets_messages_text_and_the_answer_in_the_data(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        """
        def reward(prompt, completion, answer):
            return len(prompt[-1]["content"]) + len(completion) + len(answer or "")
    """,
    )
    assert score("file", answer("xy", "z"), answer(), reward_file=str(path)) == [18, 15]


def test_a_file_of_any_name_is_read_as_python(tmp_path: Path) -> None:
    path = file_with(tmp_path, "def reward(prompt, completion, answer):\n    return 1\n")
    path = path.rename(tmp_path / "mine.txt")
    assert score("file", answer(), reward_file=str(path)) == [1]


@pytest.mark.parametrize(("value", "number"), [("True", 1.0), ("2", 2.0), ("__import__('numpy').float32(0.5)", 0.5)])
def test_what_is_a_number_is_taken_as_one(tmp_path: Path, value: str, number: float) -> None:
    path = file_with(tmp_path, f"def reward(prompt, completion, answer):\n    return {value}\n")
    assert score("file", answer(), reward_file=str(path)) == [number]


def test_a_file_that_raises_is_told_with_its_line_and_the_question(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        """
        def reward(prompt, completion, answer):
            return helper(completion)

        def helper(text):
            return int(text)  # line 6
    """,
    )
    found = refused(path, answer("not a number"))
    assert found.code == "reward-file-raises"
    assert found.values["line"] == 6
    assert "invalid literal for int()" in found.text()
    assert "How much is it?" in found.text()


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'1'", "[1]"])
def test_what_is_no_number_is_told(tmp_path: Path, value: str) -> None:
    path = file_with(tmp_path, f"def reward(prompt, completion, answer):\n    return {value}\n")
    assert refused(path).code == "reward-file-value"


@pytest.mark.parametrize(
    ("source", "code", "line"),
    [
        ("def reward(prompt:\n    pass\n", "reward-file-broken", 1),
        ("x = 1\nimport no_such_package\n", "reward-file-broken", 2),
        ("x = 1\nraise SystemExit(0)\n", "reward-file-broken", 2),
        ("def rewards(prompt, completion, answer):\n    return 1\n", "reward-file-without-function", None),
        ("reward = 3\n", "reward-file-without-function", None),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, source: str, code: str, line: int | None) -> None:
    found = refused(file_with(tmp_path, source))
    assert (found.code, found.values.get("line")) == (code, line)


def test_an_answer_may_contain_the_reference_or_be_like_it() -> None:
    answers = [answer("It is PARIS.", "Paris"), answer("Paris", "Paris"), answer("Rome", " "), answer("x", None)]
    assert score("contains", *answers) == [0, 1, None, None]
    assert score("contains_ignore_case", *answers) == [1, 1, None, None]
    likeness = answer("the cat sat", "the cat lay down")
    # Of three words and four, two are common, one after the other, and one pair of two and three.
    assert score("rouge_1", likeness) == pytest.approx([2 * 2 / (3 + 4)])
    assert score("rouge_l", likeness) == pytest.approx([2 * 2 / (3 + 4)])
    assert score("rouge_2", likeness, answer("Paris", "Paris")) == [pytest.approx(2 * 1 / (2 + 3)), None]
    near, far, equal = score("bleu", likeness, answer("dog", "the cat"), answer("the cat lay down", "the cat lay down"))
    assert 0 <= far < near < equal == pytest.approx(1)


def test_data_without_anything_to_compare_with_is_refused_and_some_of_it_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_references(["format", "length"], [None, None])
    check_references(["exact", "numeric"], ["1", "one", None])
    assert capsys.readouterr().out.splitlines() == [
        "exact: 1 of 3 rows have no answer to compare with",
        "numeric: 2 of 3 rows have no answer to compare with",
    ]
    for reward, wanted in (("exact", [None]), ("numeric", ["one", None])):
        with pytest.raises(Refusal, match="none of the"):
            check_references([reward], wanted)
