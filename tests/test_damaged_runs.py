"""One damaged file of one run is one row that says so: the table, the queue and
the pages of the others are not touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, write_json
from engine.runs import failures, progress, queue, results, runs
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run
from webui.runs_tab import head_html, output_html, table_html
from webui.words import Words

LINES = [{"step": 1, "epoch": 1, "time": 1.0, "loss": 2.0}]
FILES = (
    "request.json", "exit.json", "spec.yaml", "metrics.jsonl", "keeper.json", "progress.json",
    "lock", "error.json", "probe.json", "samples.jsonl", "prepared/summary.json", "log.txt",
)  # fmt: skip
CONTENTS: dict[str, bytes | Callable[[Path], object]] = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "half": b'{"a": ',
    "null": b"null",
    "a number": b"3",
    "a text": b'"x"',
    "endless nesting": b"[" * 100_000,
    "other keys": b'{"a": 1}',
    "of another version": b'{"outcome": "failed", "ended": 1, "reason": "tired", "code": [], "signal": {"a": 1}}',
    "other types": b'{"outcome": "failed", "ended": 1, "reason": [1], "code": "x", "signal": 99}',
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a hole": lambda path: path.open("wb").truncate(1 << 40),
}
SHOWN: dict[str, Callable[[runs.Run, Words], Any]] = {
    "row": lambda run, words: table_html.table([run], words),
    "head": lambda run, words: head_html.head(run, run.path.parents[2], words),
    "status": head_html.status,
    "findings": head_html.findings,
    "failure": head_html.failure,
    "settings": output_html.settings,
    "files": lambda run, words: output_html.files(run, "", words),
    "progress": lambda run, _: progress.progress(run),
    "curves": lambda run, _: progress.curves(run),
    "explanation": lambda run, _: failures.explain(run),
    "what it can": lambda run, _: run.can,
}


def damage(path: Path, content: bytes | Callable[[Path], object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


@pytest.fixture
def two_runs(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> tuple[Path, RunDir, RunDir]:
    saves = tmp_path / "saves"
    good, bad = (past_run(saves, make_spec(name=name), LINES, at=at) for name, at in (("good", 1e9), ("bad", 2e9)))
    for run in (good, bad):
        sweep = {"id": "both", "budget_hours": 1, "values": {}}
        write_json(run.dir.request, read_json(run.dir.request) | {"sweep": sweep})
    return saves, RunDir(good.path), RunDir(bad.path)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_harms_no_other_run_and_is_shown(two_runs: Any, file: str, content: str) -> None:
    saves, good, bad = two_runs
    damage(bad.path / file, CONTENTS[content])
    shown = {run.path: run for run in runs.find(saves)}
    assert set(shown) == {good.path, bad.path}
    assert shown[good.path].state == "finished"
    queue.advance(saves)
    results.results(saves)
    for run in shown.values():
        for show in SHOWN.values():
            show(run, Words("en"))
    if file == "exit.json":
        assert shown[bad.path].state == "failed"
        says_when = b'"ended"' in written if isinstance(written := CONTENTS[content], bytes) else False
        assert shown[bad.path].ended == (1 if says_when else None)  # a duration would be made up
        assert "damaged" in head_html.failure(shown[bad.path], Words("en"))


@pytest.mark.parametrize("content", CONTENTS)
def test_a_run_whose_request_is_damaged_before_it_ran_is_never_started(two_runs: Any, content: str) -> None:
    saves, _, bad = two_runs
    for file in (bad.exit, bad.keeper):
        file.unlink(missing_ok=True)
    damage(bad.request, CONTENTS[content])
    queue.advance(saves)
    assert runs.read(bad.path, saves).state in ("failed", "interrupted")
    assert not bad.alive()


def test_a_spec_that_cannot_be_read_is_a_sentence(two_runs: Any) -> None:
    saves, _, bad = two_runs
    damage(bad.spec, b"\xff")
    run = runs.read(bad.path, saves)
    assert run.title == bad.path.name
    with pytest.raises(Refusal, match=r"spec\.yaml of the run"):
        _ = run.spec
