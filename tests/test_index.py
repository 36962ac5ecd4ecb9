"""The index of runs says what the folders say, whatever happens to them, and reads a run that has ended once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import RunDir, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import PROJECT
from engine.runs import index, progress, queue, runs
from engine.runs.facts import newest_value, read_facts
from engine.runs.run import Run, read
from engine.spec.run_spec import RunSpec
from tests.past_runs import falling, past_run

LONG_AGO = 1_700_000_000


@pytest.fixture
def saves(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Path:
    """Five finished runs whose folders have not changed for long."""
    folder = tmp_path / "saves"
    for number in range(5):
        past_run(folder, make_spec(name=f"run-{number}"), falling(30), at=1e9 + number)
    age(folder)
    return folder


def age(saves: Path) -> None:
    for folder in saves.glob("*/*/*"):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def shown(listed: list[Run]) -> list[tuple[Any, ...]]:
    return [(run.id, run.state, run.request, run.exit, run.title, run.facts) for run in listed]


def read_anew(saves: Path) -> list[tuple[Any, ...]]:
    """The oracle: every folder read by itself, without an index."""
    folders = [path.parent for path in saves.glob("[!.]*/*/*/request.json")]
    return shown(sorted((read(folder, saves) for folder in folders), key=lambda run: -run.submitted))


COUNT_OPENS = """
import sys
from pathlib import Path
from engine.runs import runs
saves, opened = Path(sys.argv[1]), set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
for _ in range(2):
    opened.clear()
    count = len(runs.find(saves))
    print(count, sum(path.startswith(str(saves)) and Path(path).is_file() for path in opened))
"""


def opens(saves: Path) -> list[list[int]]:
    """How many runs each of two looks of a new process finds, and how many files below `saves` it opens for that."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_OPENS, str(saves)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


def test_a_run_that_has_ended_is_read_once_and_by_the_next_process_not_at_all(
    saves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opens(saves)
    assert first[0] == second[0] == 5
    assert first[1] > 5
    assert second[1] == 0
    monkeypatch.setattr(index, "WRITE_AFTER_RUNS", 1)
    expected = read_anew(saves)
    runs.find(saves)
    assert opens(saves) == [[5, 1], [5, 0]]  # the index itself
    index._index.cache_clear()
    assert shown(runs.find(saves)) == expected


def resumed(saves: Path, run: RunDir) -> None:
    run.exit.rename(run.path / "past.json")
    run.keeper.unlink()


def deleted(saves: Path, run: RunDir) -> None:
    run.path.rename(saves / ".gone")


def ended_otherwise(saves: Path, run: RunDir) -> None:
    write_json(run.exit, json.loads(run.exit.read_text()) | {"outcome": "failed"})


def renamed_model(saves: Path, run: RunDir) -> None:
    run.path.parent.parent.rename(saves / "renamed")


def damaged(saves: Path, run: RunDir) -> None:
    run.exit.unlink()
    run.exit.write_text("{")


def without_result(saves: Path, run: RunDir) -> None:
    run.adapter.rename(run.path / "moved")


CHANGES = (resumed, deleted, ended_otherwise, renamed_model, damaged, without_result)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_in_a_folder_is_seen_at_the_next_look(saves: Path, change: Callable[[Path, RunDir], None]) -> None:
    before = shown(runs.find(saves))
    assert before == read_anew(saves)
    change(saves, runs.find(saves)[2].dir)
    after = shown(runs.find(saves))
    assert after == read_anew(saves)
    assert after != before


def test_a_file_edited_in_place_is_seen_when_files_are_compared(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.find(saves)[0]
    folder_changed = run.path.stat().st_mtime_ns
    run.dir.spec.write_text(run.dir.spec.read_text().replace("run-4", "edited"))
    assert run.path.stat().st_mtime_ns == folder_changed
    monkeypatch.setattr(index, "RECHECK_SECONDS", 0.0)
    assert runs.find(saves)[0].title == "edited"


def test_files_are_not_all_compared_in_one_look(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that were read at the same time, some are compared sooner than others, and all in time."""
    clock = [1000.0]
    monkeypatch.setattr(index.time, "monotonic", lambda: clock[0])
    runs.find(saves)
    compared: list[tuple[str, float]] = []
    stamp = index._stamp
    monkeypatch.setattr(index, "_stamp", lambda folder: compared.append((folder, clock[0])) or stamp(folder))
    for _ in range(30):
        clock[0] += 1
        runs.find(saves)
    assert {folder for folder, _ in compared} == {str(run.path) for run in runs.find(saves)}
    assert len({at for _, at in compared}) == 5


def test_a_folder_that_has_just_changed_is_not_relied_on(saves: Path) -> None:
    run = runs.find(saves)[0]
    now = time.time_ns()
    os.utime(run.path, ns=(now, now))
    runs.find(saves)
    write_json(run.dir.exit, json.loads(run.dir.exit.read_text()) | {"outcome": "stopped"})
    os.utime(run.path, ns=(now, now))  # as where the clock of the file system has not ticked in between
    assert runs.find(saves)[0].state == "stopped"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 1}',
        b'{"version": 0, "runs": {}}',
        b'{"version": 1, "runs": {"a/b/c": 3}}',
        b'{"version": 1, "runs": {"a/b/c": [1, "", "finished", {}, {}, {"x": 1}]}}',
        b'{"version": 1, "runs": {"a/b/c": [1, "", "finished", [], [], {}]}}',
        b"\xff" * 100,
        b"[" * 100_000,
    ],
)
def test_a_damaged_index_is_made_again(saves: Path, content: bytes) -> None:
    (saves / index.FILE).write_bytes(content)
    index._index.cache_clear()
    assert shown(runs.find(saves)) == read_anew(saves)


def test_an_index_cannot_be_written_and_the_runs_are_listed(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WRITE_AFTER_RUNS", 1)
    (saves / index.FILE).mkdir()
    assert shown(runs.find(saves)) == read_anew(saves)
    assert [path.name for path in saves.glob(".runs*")] == [index.FILE]


def test_the_queue_looks_at_no_run_that_has_ended(saves: Path, make_spec: Callable[..., RunSpec]) -> None:
    runs.find(saves)
    assert index.open_runs(saves) == []
    waits = past_run(saves, make_spec(name="waits"), outcome=None)
    waits.dir.keeper.unlink()
    assert [run.path for run in queue.waiting(saves)] == [waits.path]
    assert queue.place(read(waits.path, saves)).number == 1
    assert queue.place(runs.find(saves)[0]) is None


def test_a_link_to_itself_and_a_foreign_file_harm_no_list(saves: Path) -> None:
    expected = read_anew(saves)
    (saves / "loop").symlink_to(saves / "loop")
    (saves / "up").symlink_to(saves.parent)
    (saves / "notes.txt").write_text("mine")
    (saves / "a" / "b" / "c").mkdir(parents=True)
    locked = saves / "locked"
    locked.mkdir(mode=0)
    assert shown(runs.find(saves)) == expected
    locked.chmod(0o700)


NAMES = (
    "plain", "a: b", "it's", "日本語 'q' \"z\"", "# no", "many words " * 7,
    "1e-5", "- x", "null", "{a}", "model: other", "  edges ", "a\\nb",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_what_the_spec_says(tmp_path: Path, name: str) -> None:
    spec = RunSpec.read(
        {
            "name": name,
            "stage": {"kind": "dpo"},
            "method": {"kind": "freeze"},
            "model": {"model_name_or_path": f"/models/{name}"},
            "data": {"datasets": {name: 0.5, "chat": 1.0}},
        }
    )
    run = RunDir(tmp_path)
    run.spec.write_text(spec.to_yaml(), encoding="utf-8")
    facts = read_facts(run, "training")
    assert (facts.name, facts.base) == (spec.name, spec.model.model_name_or_path)
    assert (facts.stage, facts.method, facts.data) == ("dpo", "freeze", tuple(spec.data.datasets))
    run.spec.write_text(json.dumps(spec.model_dump(mode="json")), encoding="utf-8")  # YAML of another layout
    assert read_facts(run, "training") == facts


def test_facts_of_an_evaluation_name_its_sets_and_tasks(tmp_path: Path) -> None:
    spec = EvaluationSpec.read(
        {
            "name": "measured",
            "model": {"model_name_or_path": "/m"},
            "data": {"datasets": ["a", "b"]},
            "harness": {"tasks": ["arc"]},
        }
    )
    (tmp_path / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    facts = read_facts(RunDir(tmp_path), "evaluation")
    assert (facts.name, facts.base, facts.stage, facts.data) == ("measured", "/m", "", ("a", "b", "arc"))


def test_the_newest_value_is_the_last_of_the_curve(saves: Path) -> None:
    run = runs.find(saves)[0]
    assert run.facts.headline == progress.curves(run)["loss"].value[-1]


LINE = {"step": 1, "epoch": 0.5, "time": 1.0}


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ([], None),
        ([LINE | {"eval_loss": 3.0}], None),
        ([LINE | {"loss": 2.0}, LINE | {"loss": None}], 2.0),
        ([LINE | {"loss": 2.0}, *[LINE | {"loss": None}] * 3], None),
        ([LINE | {"loss": 2.0}, {"loss": 1.0}], 2.0),  # no line of a curve
        ([LINE | {"loss": 2.0}, *[LINE | {"eval_loss": 1.0}] * 500], 2.0),
        ([LINE | {"loss": 2.0}, LINE | {"loss": "high"}], 2.0),
    ],
)
def test_the_newest_value_of_a_metrics_file(tmp_path: Path, lines: list[Any], value: float | None) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    assert newest_value(file, "loss") == value


def test_an_infinite_value_is_no_newest_value(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(LINE | {"loss": value}) + "\n" for value in (1.5, math.inf)))
    assert newest_value(file, "loss") == 1.5


ODD_FILES = {
    "kind": ("request.json", '{"kind": [], "submitted": 1}'),
    "kind object": ("request.json", '{"kind": {}, "submitted": 1}'),
    "empty tag": ("spec.yaml", "name: !!int ''"),
    "sexagesimal": ("spec.yaml", "name: " + "1:" * 400 + "1.0"),
    "digits": ("metrics.jsonl", json.dumps(LINE)[:-1] + ', "loss": ' + "9" * 400 + "}"),
    "stage": ("spec.yaml", "stage: [1]\nmodel: {a: 1}"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_whatever_stands_in_a_file_the_others_are_listed(saves: Path, case: str) -> None:
    name, text = ODD_FILES[case]
    run = runs.find(saves)[2]
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).write_text(text + "\n")
    assert len(runs.find(saves)) == 5
    queue.advance(saves)
    assert [other.title for other in runs.find(saves) if other.id != run.id]


@pytest.mark.parametrize(
    "text", ["a\nmethod:\n  kind: full\nb", "x\n  kind: lora", "  model:\n    model_name_or_path: evil"]
)
def test_a_text_of_several_lines_is_not_taken_for_settings(tmp_path: Path, text: str) -> None:
    spec = RunSpec.read({"model": {"model_name_or_path": text}, "data": {"datasets": {text: 1.0}}})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    facts = read_facts(RunDir(tmp_path), "training")
    assert (facts.base, facts.data, facts.method, facts.stage) == (text, (text,), "lora", "sft")


LIST_AS_NOBODY = """
import os, sys
from pathlib import Path
from engine.runs import queue, runs
if os.getuid() == 0: os.setuid(65534)
saves = Path(sys.argv[1])
print(*sorted(run.title for run in runs.find(saves)))
queue.waiting(saves)
"""


@pytest.mark.parametrize("inside", [".", "adapter", "spec.yaml", "exit.json"])
def test_a_folder_of_another_user_hides_no_run(saves: Path, inside: str) -> None:
    """Looked at by a process without rights: whoever runs the tests may be allowed everything."""
    for parent in (saves, *saves.parents):  # pytest's folders are its user's alone
        if not (mode := parent.stat().st_mode) & 0o001:
            parent.chmod(mode | 0o055)
    closed = saves / "tiny" / "lora" / "run-2" / inside
    mode = closed.stat().st_mode
    closed.chmod(0)
    words = [sys.executable, "-c", LIST_AS_NOBODY, str(saves)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    closed.chmod(mode)
    assert done.returncode == 0, done.stderr
    assert {"run-0", "run-1", "run-3", "run-4"} <= set(done.stdout.split())
