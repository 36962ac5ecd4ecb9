"""A data set that cannot be read is told as such by a look at the ends of its files, and offered behind all others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.data import row_files
from engine.data.datasets import find, read_dataset_info
from engine.data.row_files import Entry
from engine.data.soundness import flaw
from engine.data.validation import recommended
from engine.launch.workspace import Workplace
from engine.preflight.checks import preflight_problems
from engine.spec.run_spec import RunSpec
from webui.data_tab import set_html
from webui.train_tab.choices import dataset_choices
from webui.words import Words

ROWS = [{"instruction": f"Name metal {n}.", "output": "Iron."} for n in range(300)]
LIST, LINES = json.dumps(ROWS, indent=1), "".join(json.dumps(row) + "\n" for row in ROWS)
BROKEN = {
    "empty.json": ("", "dataset-empty"),
    "header.csv": ("instruction,output\n", "dataset-empty"),
    "half.json": (LIST[: len(LIST) // 2], "file-ends-early"),
    "open.json": (LIST.rstrip("]\n"), "file-ends-early"),
    "half.jsonl": (LINES[: len(LINES) // 2 - 20], "file-ends-early"),
    "nothing.jsonl": ("\0" * 5000, "file-no-json"),
    "nothing.csv": ("instruction,output\n" + "Hi\0\0,a\0\n" * 50, "row-zero"),
    "cut.parquet": ("PAR1 and no more", "file-broken-parquet"),
}
SOUND = {
    "list.json": LIST,
    "lines.jsonl": LINES + "\n \n",
    "one.jsonl": LINES.splitlines()[0],
    "last.jsonl": LINES + "no row",
}
COLUMNS = {"prompt": "instruction", "response": "output"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of its own, whose entries say what their columns are: so that no file has to be looked into for that."""
    files = {name: text for name, (text, _) in BROKEN.items()} | SOUND
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    entries = {name: {"file_name": name, "columns": COLUMNS} for name in files}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_set_that_cannot_be_read_is_known_by_its_ends(data: Path, name: str) -> None:
    problems = flaw(find(data, name))
    assert problems is not None
    assert problems.code == BROKEN[name][1]
    listed = set_html.listed([find(data, name)], {}, [], [], "", Words("zh"))
    assert 'class="wrong"' in listed
    assert problems.text("zh")[:12] in set_html.head(find(data, name), None, Words("zh"))


@pytest.mark.parametrize("name", SOUND)
def test_a_set_that_can_be_read_to_its_end_has_no_flaw(data: Path, name: str) -> None:
    assert flaw(find(data, name)) is None
    assert 'class="wrong"' not in set_html.listed([find(data, name)], {}, [], [], "", Words("en"))


def test_what_cannot_be_read_is_recommended_nowhere_and_stands_last_where_one_chooses(
    data: Path,
) -> None:
    here = Workplace(data=data, saves=data / "saves")
    assert recommended(read_dataset_info(data)[0], "chat") == list(SOUND)
    labels = [label for label, _ in dataset_choices(here, Words("en"))]
    assert labels[len(SOUND) :] == [f"{name} · cannot be read" for name in BROKEN]
    spec = RunSpec.read({"data": {"datasets": ["lines"], "dataset_dir": str(data)}})
    (unknown,) = [dataset for dataset in preflight_problems(spec, here, wait=False) if dataset.code == "data-unknown"]
    assert unknown.values["known"] == ", ".join(SOUND)


def test_a_large_file_is_not_read_through_for_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between the beginning and the end is not even rows here."""
    (data / "lines.jsonl").write_text(LINES + "{ no row\n" * 100_000 + LINES)
    seen: list[int] = []
    read = row_files.READERS[".jsonl"]

    def counted(*given: object) -> Iterator[Entry]:
        for entry in read(*given):
            seen.append(1)
            yield entry

    monkeypatch.setitem(row_files.READERS, ".jsonl", counted)
    assert flaw(find(data, "lines.jsonl")) is None
    assert len(seen) <= 20
