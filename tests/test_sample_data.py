"""The sample data is what its recipes make, and every demo could start on it."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.launch.workspace import PROJECT, Workplace
from engine.preflight.checks import preflight_problems
from engine.spec.contradictions import spec_problems

DATA = PROJECT / "data"
RECIPES = [runpy.run_path(str(DATA / f"{name}_recipe.py")) for name in ("preference", "tickets")]
FILES = {file: make for recipe in RECIPES for file, make in recipe["FILES"].items()}


def rows_of(file: str) -> list[dict[str, Any]]:
    return json.loads((DATA / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES)
def test_the_sample_data_is_what_the_recipe_makes(file: str) -> None:
    assert rows_of(file) == FILES[file]()


def test_the_better_answers_are_the_translations_and_no_worse_one_is() -> None:
    right = {row["instruction"]: row["output"] for row in rows_of("alpaca_translate_zh.json")}
    pairs = rows_of("translate_pairs_zh.json")
    assert all(right[row["instruction"]] == row["chosen"] != row["rejected"] for row in pairs)
    thumbs = rows_of("translate_thumbs_zh.json")
    assert all((right[row["instruction"]] == row["output"]) == row["kto_tag"] for row in thumbs)
    assert Counter(row["kto_tag"] for row in thumbs) == {True: 120, False: 120}


@pytest.mark.parametrize("preset", [name for name in Workplace().presets() if name.startswith("demo")])
def test_nothing_stands_in_the_way_of_a_demo(preset: str, tmp_path: Path) -> None:
    place = Workplace(saves=tmp_path)
    spec = place.frozen(place.preset(preset))
    assert spec_problems(spec) + preflight_problems(spec, place) == []


@pytest.mark.parametrize("file", ["tickets.json", "tickets_test.json"])
def test_no_held_out_message_is_about_what_was_trained(file: str) -> None:
    rows = rows_of(file)
    other = "tickets_test.json" if file == "tickets.json" else "tickets.json"
    others = (DATA / other).read_text(encoding="utf-8")
    for row in rows:
        ticket = json.loads(row["output"])
        assert list(ticket) == ["order", "product", "problem", "wants"]
        assert ticket["product"] in row["input"]
        assert (ticket["order"] or "") in row["input"]
        assert f'\\"{ticket["product"]}\\"' not in others
        assert row["input"] not in others
