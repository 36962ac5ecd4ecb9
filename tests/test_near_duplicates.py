"""Rows that are nearly the same: each that is left out is as similar as was asked for, by a comparison of all with
all, and what may look alike but teaches something else stays."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.data import data_jobs, derive
from engine.data.datasets import find
from engine.data.near_duplicates import bands, near_duplicates

WORDS = [
    "the",
    "a",
    "of",
    "river",
    "mountain",
    "train",
    "learns",
    "model",
    "data",
    "token",
    "gradient",
    "slowly",
    "quickly",
    "red",
    "blue",
    "数据",
    "模型",
    "训练",
]


def write(folder: Path, name: str, rows: list[Any], **entry: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def varied(seed: int) -> list[str]:
    """Texts of 60 words; half of them are an earlier one with one to twenty words replaced."""
    chance, texts = random.Random(seed), []
    for number in range(90):
        if number % 2 and texts:
            words = chance.choice(texts).split()
            for _ in range(chance.randint(1, 20)):
                words[chance.randrange(len(words))] = chance.choice(WORDS)
        else:
            words = [chance.choice(WORDS) + str(chance.randrange(30)) for _ in range(60)]
        texts.append(" ".join(words))
    return texts


def overlap(first: str, second: str) -> float:
    """The Jaccard similarity of the two texts' windows of five characters."""
    windows = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, second)]
    return len(windows[0] & windows[1]) / len(windows[0] | windows[1])


def test_similar_rows_are_those_of_a_comparison_of_all_with_all(tmp_path: Path) -> None:
    texts = [text.casefold() for text in varied(3)]
    write(tmp_path, "texts", [{"text": text} for text in texts], columns={"prompt": "text"})
    removed = near_duplicates(find(tmp_path, "texts"), 0.7)
    expected = {}
    for number, text in enumerate(texts):
        earlier = [other for other in range(number) if other not in expected and overlap(text, texts[other]) >= 0.7]
        if earlier:
            expected[number] = earlier
    assert len(expected) > 10
    assert removed.keys() == expected.keys()
    for number, pair in removed.items():
        other = number - (pair.place.row - pair.earlier.row)
        assert other in expected[number]
        assert pair.similarity == pytest.approx(overlap(texts[number], texts[other]))


def test_rows_that_differ_in_image_or_label_are_never_similar(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Is this a good answer to the long question of the day?"},
        {"from": "gpt", "value": "It is."},
    ]
    rows = [{"conversations": turns, "label": label} for label in (True, False, True)]
    columns = {"messages": "conversations", "kto_tag": "label"}
    write(tmp_path, "thumbs", rows, formatting="sharegpt", columns=columns)
    assert list(near_duplicates(find(tmp_path, "thumbs"), 0.8)) == [2]


def test_a_set_without_similar_rows_is_made_and_says_which_were_removed(tmp_path: Path) -> None:
    long = "A fine-tuning run is a value and a folder, and its state is derived from the folder alone"
    texts = [
        long,
        long.upper(),
        long,
        f"{long}!",
        "Something else entirely, of about the same length as the others are",
    ]
    write(tmp_path, "texts", [{"text": text} for text in texts] + [{"nothing": 1}], columns={"prompt": "text"})
    arguments = {"data": str(tmp_path), "name": "texts", "similarity": 0.9}
    result = data_jobs.wait(data_jobs.start(tmp_path / "saves", "deduplicate", arguments), 300)
    assert result["made"] == ["texts-unique"]
    rows = [json.loads(line) for line in (tmp_path / "texts-unique.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.get("text") for row in rows] == [texts[0], texts[4], None]
    assert result["similar"] == 2  # the third is equal
    (row, earlier, similarity), (_, _, less) = result["pairs"]
    assert ("(#2)" in row, "(#1)" in earlier, similarity) == (True, True, 1.0)
    assert 0.9 <= less < 1
    with pytest.raises(Refusal, match="equal or that similar"):
        derive.deduplicate(tmp_path, "texts-unique", 0.9)


def test_many_copies_are_not_compared_with_each_other(tmp_path: Path) -> None:
    text = " ".join(varied(1)[:2])
    rows = [{"text": f"{text} {number}"} for number in range(600)]
    write(tmp_path, "copies", rows, columns={"prompt": "text"})
    assert len(near_duplicates(find(tmp_path, "copies"), 0.8)) == 599


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_nearly_all_pairs_at_the_threshold_are_proposed_with_the_fewest_bands(threshold: float) -> None:
    def missed(count: int) -> float:
        """The probability that no band of `count` agrees."""
        return (1 - threshold ** (128 / count)) ** count

    count = bands(threshold)
    assert missed(count) <= 0.01
    assert count == 1 or missed(count // 2) > 0.01


@pytest.mark.parametrize("similarity", [0.0, 0.49, 1.01, float("nan"), float("inf"), -1.0])
def test_other_similarities_are_refused(tmp_path: Path, similarity: float) -> None:
    write(tmp_path, "texts", [{"text": "x"}], columns={"prompt": "text"})
    with pytest.raises(Refusal, match=r"0\.5 to 1"):
        derive.deduplicate(tmp_path, "texts", similarity)
