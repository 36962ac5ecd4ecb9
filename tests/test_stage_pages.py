"""The pages about the stages: what they tell to copy works, and both languages tell the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.core.stages import STAGES
from engine.data.datasets import read_dataset_info
from engine.data.validation import check
from engine.launch.workspace import PROJECT

PAGES = PROJECT / "docs" / "stages"


def title_stage(page: Path) -> str:
    """The kind of stage that a page's title names."""
    return re.search(r"^# .*`(\w+)`", page.read_text(encoding="utf-8"))[1]


def blocks(page: Path) -> list[str]:
    """What is set in to be copied."""
    text = page.read_text(encoding="utf-8")
    return [re.sub(r"^    ", "", one, flags=re.M).strip() for one in re.findall(r"(?:^    .*\n)+", text, re.M)]


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_row_and_an_entry_that_are_copied_from_a_page_suit_its_stage(page: Path, tmp_path: Path) -> None:
    copied = blocks(page)
    entry = json.loads("{" + next(one for one in copied if one.startswith('"')) + "}")
    ((name, told),) = entry.items()
    rows = copied[0] if told["file_name"].endswith("l") else f"[{copied[0].replace(chr(10), ',')}]"
    (tmp_path / told["file_name"]).write_text(rows, encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    ((dataset,), broken) = read_dataset_info(tmp_path)
    assert not broken
    report = check(dataset, STAGES[title_stage(page)].form, datasets=[dataset])
    assert (dataset.name, report.problems) == (name, ())


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_tells_the_same_in_both_languages(page: Path) -> None:
    chinese = PAGES / "zh" / page.name
    assert title_stage(chinese) == title_stage(page)
    assert [one.split(":")[0] for one in blocks(chinese)] == [one.split(":")[0] for one in blocks(page)]
    sections = [len(re.findall(r"^## ", one.read_text(encoding="utf-8"), re.M)) for one in (page, chinese)]
    assert sections[0] == sections[1] >= 4
