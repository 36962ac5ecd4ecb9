"""The pictures, the demo model that reads images, and their recipes: the model knows the words and none of the answers.

That it learns the answers is tested in a browser, with the held-out pictures: `tests/browser/test_images.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from engine.data import preview_client
from engine.launch.workspace import DEMO_VISION_MODEL, Workplace
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

DATA = DEMO_VISION_MODEL.parent


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the second recipe imports the first
    spec.loader.exec_module(module)
    return module


SHAPES = load_recipe("shapes_recipe")
RECIPE = load_recipe("demo_vision_model_recipe")


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def pixels_of(row: dict[str, Any]) -> bytes:
    with Image.open(DATA / row["images"][0]) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["shapes", "shapes_test"])
def test_rows_and_pictures_are_what_the_recipe_makes(name: str) -> None:
    rows = rows_of(name)
    assert [(row, pixels_of(row)) for row in rows] == [
        (row, picture.tobytes()) for row, picture in SHAPES.examples(name)
    ]
    answers = Counter(row["output"] for row in rows)
    assert len(rows) == 60
    assert set(answers.values()) == {2}
    assert max(answers.values()) / len(rows) < 0.04  # the best constant answer


@pytest.fixture(scope="module")
def lessons() -> list[tuple[Any, Any]]:
    """All lessons of the pre-training, with their pictures."""
    return list(itertools.islice(RECIPE.illustrated_lessons(), RECIPE.STEPS * RECIPE.BATCH))


@pytest.mark.slow
def test_no_held_out_picture_is_ever_trained_on(lessons: list[tuple[Any, Any]]) -> None:
    held_out = {pixels_of(row) for row in rows_of("shapes_test")}
    assert len(held_out) == 60
    assert held_out.isdisjoint(pixels_of(row) for row in rows_of("shapes"))
    drawn = {picture.tobytes() for _, picture in lessons if picture}
    assert len(drawn) > 0.99 * sum(picture is not None for _, picture in lessons)
    assert held_out.isdisjoint(drawn)


@pytest.mark.slow
def test_no_lesson_says_in_words_what_is_in_a_picture(lessons: list[tuple[Any, Any]]) -> None:
    words = {*SHAPES.COLOURS, *SHAPES.SHAPES}
    about_pictures = {(question, answer) for (_, question, answer), picture in lessons if picture}
    assert about_pictures
    assert not any(word in f"{question} {answer}" for question, answer in about_pictures for word in words)
    assert SHAPES.QUESTION.removeprefix("<image>") not in {question for question, _ in about_pictures}
    repeated = {answer for (_, _, answer), picture in lessons if not picture}
    assert {row["output"] for row in rows_of("shapes_test")} <= repeated


def test_the_model_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in DEMO_VISION_MODEL.iterdir()}
    assert sum(files.values()) <= 8 * 1024 * 1024
    assert {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files)


def test_what_the_model_sees_names_the_image_of_each_span_of_tokens(tmp_path: Path) -> None:
    try:
        spec = Workplace(saves=tmp_path).preset("demo_images")
        answer = preview_client.ask("page", spec, DATA, "shapes", first=3, size=2)
    finally:
        preview_client._end_child()
    for row, shown in zip(rows_of("shapes")[2:4], answer["rows"], strict=True):
        (side,) = shown["sides"]
        ((begin, image),) = side["images"]
        assert image == str(DATA / row["images"][0])
        texts = [text for _, text, _, _ in side["pieces"]]
        assert texts[begin - 1] == RECIPE.VISION_START
        assert texts[begin : begin + 9] == [RECIPE.IMAGE] * 9
        assert texts[begin + 9] == RECIPE.VISION_END


@pytest.mark.slow
def test_the_recipe_still_works(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = run_python(DATA / "demo_vision_model_recipe.py", tmp_path / "model", "--steps", 30, env=environment)
    made = json.loads(printed.splitlines()[-1])
    assert made["steps"] == 30
    assert made["first_loss"] == pytest.approx(5.95, abs=0.3)  # ln 384: every token equally likely
    assert made["last_loss"] < 3.5
    for file in DEMO_VISION_MODEL.iterdir():
        same = (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()
        assert same == (file.suffix != ".safetensors"), file.name
