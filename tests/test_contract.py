"""The folder of a run is a contract: other programs, and next year's version, rely on these names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core import locks, rundir
from engine.core.rundir import RunDir, read_json, write_text
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.process_lifecycle import ProgressReport

pytestmark = pytest.mark.usefixtures("forked")


def test_the_names_of_a_runs_files_do_not_change() -> None:
    run = RunDir(Path("/x"))
    names = {name: path.name for name in vars(RunDir) if isinstance(path := getattr(run, name), Path)}
    assert names == {
        "spec": "spec.yaml",
        "accelerate": "accelerate.yaml",
        "connection": "connection.json",
        "request": "request.json",
        "lock": "lock",
        "keeper": "keeper.json",
        "log": "log.txt",
        "progress": "progress.json",
        "metrics": "metrics.jsonl",
        "prepared": "prepared",
        "adapter": "adapter",
        "model": "model",
        "plot": "training_loss.png",
        "error": "error.json",
        "exit": "exit.json",
        "attempts": "attempts",
        "initial": "initial_adapter",
        "samples": "samples.jsonl",
        "report": "report",
        "probe": "probe.json",
        "gguf": "gguf.json",
        "warnings": "warnings.jsonl",
        "stalled": "stalled.txt",
        "reserve": ".reserve",
        "slurm": "slurm.json",
        "slurm_refused": "slurm_refused.json",
        "heartbeat": "heartbeat",
        "pause": "pause.json",
        "left_out": "left_out.json",
        "notifications": "notifications.json",
    }
    assert (rundir.COMPLETE_FILE, rundir.RESULT_FILE) == ("complete.json", "result.json")


def test_each_state_follows_from_the_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.request.write_text('{"submitted": 1, "queued": 1}')
    assert runs.state(run) == "queued"
    lock = locks.try_lock(run.lock, rundir.ALIVE_BYTE, shared=True)
    assert runs.state(run) == "preparing"
    run.progress.write_text('{"phase": "training"}')
    assert runs.state(run) == "running"
    run.request.write_text('{"submitted": 1, "queued": 1, "stop": {"how": "save"}}')
    assert runs.state(run) == "stopping"
    rundir.os.close(lock)
    assert runs.state(run) == "queued"  # never had a keeper
    run.keeper.write_text("{}")
    assert runs.state(run) == "interrupted"
    for outcome in ("finished", "stopped", "failed"):
        run.exit.write_text(json.dumps({"outcome": outcome, "ended": 2}))
        assert runs.state(run) == outcome


def test_a_frozen_spec_is_whole_and_reads_back_equal(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    run = runs.submit(make_spec(), workplace, by="ada")
    text = run.dir.spec.read_text(encoding="utf-8")
    assert RunSpec.from_yaml(text) == run.spec
    assert "lr_scheduler_type" in text  # defaults too: a later version may have others
    assert run.by == "ada"


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "exit.json"
    write_text(file, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new and longer")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_training_does_not_wait_for_the_disk_to_say_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(rundir.os, "fsync", waits.append)
    ProgressReport(RunDir(tmp_path))("training", 3, 9)
    assert read_json(tmp_path / "progress.json")["done"] == 3
    assert not waits
    write_text(tmp_path / "exit.json", "{}")
    assert len(waits) == 1
