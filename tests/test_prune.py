"""Only what a result does not need goes, only when it was said so, and never from under a run that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.locks import try_lock
from engine.core.rundir import RunDir, write_json
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import prune, runs
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run
from webui.system_tab.storage_panel import StoragePanel
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

LONG_AGO = time.time() - 30 * prune.DAY_SECONDS


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def saves(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Path:
    """A finished, a stopped and a failed run, each with checkpoints and
    prepared rows; a cache; remains of a deleted run."""
    folder = tmp_path / "saves"
    for name, outcome in (("done", "finished"), ("stopped", "stopped"), ("failed", "failed"), ("cut", None)):
        run = past_run(folder, make_spec(name=name), outcome=outcome).path
        write(run / "checkpoint-4" / "model.safetensors", 1000)
        write(run / "checkpoint-4" / "complete.json", 10)
        write(run / "prepared" / "train.arrow", 500)
        write(run / "prepared" / "summary.json", 20)
    write(folder / ".prepared" / "abc" / "train.arrow", 700)
    write(folder / ".deleted" / "old" / "adapter.bin", 300)
    return folder


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_can_go_is_listed_with_what_it_frees(saves: Path) -> None:
    listed = {(item.kind, item.path.relative_to(saves).as_posix(), item.bytes) for item in prune.removable(saves)}
    assert listed == {
        ("checkpoints", "tiny/lora/done/checkpoint-4", 1010),
        ("rows", "tiny/lora/done/prepared/train.arrow", 500),
        ("cache", ".prepared/abc", 700),
        ("deleted", ".deleted/old", 300),
    }
    assert [item.bytes for item in prune.removable(saves)] == [1010, 700, 500, 300]
    assert prune.removable(saves, ["rows"], at_least_bytes=501) == []
    assert len(prune.removable(saves, older_than_days=29)) == 4
    assert prune.removable(saves, older_than_days=31) == []


def test_rows_that_a_node_of_a_cluster_may_be_preparing_are_not_listed(saves: Path) -> None:
    write(saves / ".prepared" / ".partial-x" / "lock", 0)
    assert len(prune.removable(saves, ["cache"])) == 2  # here, the lock says that nobody does
    (saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    assert [item.path.name for item in prune.removable(saves, ["cache"])] == ["abc"]


def test_rows_that_a_run_and_the_cache_share_are_counted_once(saves: Path) -> None:
    rows = saves / "tiny" / "lora" / "done" / "prepared" / "train.arrow"
    rows.unlink()
    os.link(saves / ".prepared" / "abc" / "train.arrow", rows)
    assert [(item.kind, item.bytes) for item in prune.removable(saves, ["rows", "cache"])] == [
        ("rows", 700),
        ("cache", 0),
    ]
    prune.remove(saves, prune.removable(saves, ["rows"]))
    assert [item.bytes for item in prune.removable(saves, ["cache"])] == [700]


def test_what_is_removed_is_what_was_listed_and_the_result_stays(saves: Path) -> None:
    before = everything(saves)
    gone = prune.remove(saves, prune.removable(saves))
    assert len(gone) == 4
    assert before - everything(saves) == {
        "tiny/lora/done/checkpoint-4/model.safetensors",
        "tiny/lora/done/checkpoint-4/complete.json",
        "tiny/lora/done/prepared/train.arrow",
        ".prepared/abc/train.arrow",
        ".deleted/old/adapter.bin",
    }
    assert prune.removable(saves) == []
    assert (saves / "tiny/lora/done/adapter/result.json").exists()


def test_a_run_that_goes_on_since_it_was_listed_keeps_everything(saves: Path) -> None:
    items = prune.removable(saves, ["checkpoints", "rows"])
    run = RunDir(saves / "tiny" / "lora" / "done")
    run.exit.rename(run.path / "past.json")
    run.keeper.unlink()  # resumed: it waits
    assert prune.remove(saves, items) == []
    assert (run.path / "checkpoint-4" / "model.safetensors").exists()


def test_a_finished_run_without_a_result_keeps_its_checkpoints(saves: Path) -> None:
    run = runs.get(saves, "tiny/lora/done")
    (run.dir.adapter / "result.json").unlink()
    write_json(run.dir.progress, {})  # its folder has changed
    assert prune.removable(saves, ["checkpoints"]) == []


def test_the_shell_lists_first_and_removes_when_told(saves: Path) -> None:
    def shell(*words: str) -> str:
        command = [sys.executable, "-m", "engine", "prune", "--saves", str(saves), *words]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    before = everything(saves)
    listed = shell()
    assert "4 items can be deleted" in listed
    assert "tiny/lora/done/checkpoint-4" in listed
    assert everything(saves) - {".queue.lock"} == before
    assert "1 item deleted" in shell("--what", "checkpoints", "--yes")
    assert "3 items can be deleted" in shell()
    assert "0 items can be deleted" in shell("--older-than", "99")


def test_the_page_lists_and_removes_what_is_chosen(saves: Path) -> None:
    panel = StoragePanel(Words("en"), Workplace(saves=saves), "message")
    panel.items, panel.remove, panel.sure, panel.listed = "items", "remove", "sure", "listed"
    listed = panel.list_items(["checkpoints", "rows", "nonsense"], 7)
    assert listed["remove"]["visible"] is True
    assert "2 items to delete, 1.51 KB in total" in listed["items"]
    for days in (None, -5):
        assert panel.list_items(["cache"], days)["remove"]["visible"] is False
        assert "0 or more" in panel.list_items(["cache"], days)["items"]
    assert panel.nothing() == {
        "items": "",
        "listed": "",
        "remove": {"visible": False, "__type__": "update"},
        "sure": {"visible": False, "__type__": "update"},
    }
    listed = panel.list_items(["checkpoints"], 7)["listed"]
    done = panel.remove_items(listed, ["checkpoints", "cache"], 0)  # ticked since: that was not listed
    assert "1 item deleted" in done["message"]
    assert "1 item to delete" in done["items"]
    assert len(prune.removable(saves)) == 3


def test_a_checkpoint_that_another_run_stands_on_stays(saves: Path, make_spec: Callable[..., RunSpec]) -> None:
    base = str(saves / "tiny" / "lora" / "done" / "checkpoint-4")
    items = prune.removable(saves, ["checkpoints"])
    past_run(saves, make_spec(name="later", model__model_name_or_path=base))
    assert prune.removable(saves, ["checkpoints"]) == []
    assert prune.remove(saves, items) == []  # listed before the other run was there
    assert Path(base, "model.safetensors").exists()


def test_what_could_not_be_removed_in_whole_is_listed_again(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune.shutil, "rmtree", lambda *_, **__: None)  # as a kill in between leaves it
    prune.remove(saves, prune.removable(saves, ["checkpoints"]))
    monkeypatch.undo()
    [old, left] = sorted(prune.removable(saves, ["deleted"]), key=lambda item: item.bytes)
    assert (old.bytes, left.bytes) == (300, 1010)
    assert len(prune.remove(saves, [left])) == 1
    assert not left.path.exists()


def test_a_link_is_never_followed(saves: Path, tmp_path: Path) -> None:
    write(tmp_path / "home" / "thesis.tex", 100)
    link = saves / "tiny" / "lora" / "done" / "checkpoint-9"
    link.symlink_to(tmp_path / "home")
    assert link not in [item.path for item in prune.removable(saves)]
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_nobody_waits_for_a_long_deletion(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = []

    def while_removing(*_: object, **__: object) -> None:
        lock = try_lock(saves / ".queue.lock", 0, shared=False)
        free.append(lock is not None)
        os.close(lock)

    monkeypatch.setattr(prune.shutil, "rmtree", while_removing)
    prune.remove(saves, prune.removable(saves, ["checkpoints"]))
    assert free == [True]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x"])
@pytest.mark.parametrize("option", ["--older-than", "--larger-than"])
def test_an_absurd_bound_removes_nothing_and_is_a_sentence(saves: Path, option: str, text: str) -> None:
    before = everything(saves)
    command = [sys.executable, "-m", "engine", "prune", "--saves", str(saves), "--yes", f"{option}={text}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert option in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(saves) == before
