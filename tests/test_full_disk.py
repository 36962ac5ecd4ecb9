"""A disk that is too small, met before the start and in the middle: a sentence, and nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, write_json
from engine.launch.workspace import Workplace
from engine.runs import failures, queue, runs, supervisor
from engine.runs.run import ALIVE_STATES
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[bool]:
    """A real file system of that size at `folder`; False where one may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        yield not done.returncode
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two megabytes; where nothing may be mounted, only the answer about free space is small."""
    folder = tmp_path / "small"
    with mounted(folder, 2) as is_real:
        if not is_real:
            monkeypatch.setattr(hardware, "free_disk", lambda path: 2_000_000)
        yield folder


def test_a_run_that_cannot_fit_is_refused_with_both_sizes(
    workplace: Workplace, make_spec: Callable[..., RunSpec], small_disk: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        runs.submit(make_spec(), dataclasses.replace(workplace, saves=small_disk))
    assert [one.code for one in refused.value.problems] == ["disk-full"]
    assert "only 0.00 GB is free" in refused.value.problems[0].text("en")
    assert list(small_disk.glob("*")) == []


def test_a_disk_that_fills_up_during_a_run_is_named_as_the_reason(
    workplace: Workplace, make_spec: Callable[..., RunSpec], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        f"import errno\nfile = open({str(small_disk / 'filler')!r}, 'wb')\n"
        "for _ in range(64):\n    file.write(b'x' * 65536); file.flush()\n"
        "raise OSError(errno.ENOSPC, 'No space left on device')"
    )
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, source))
    run = runs.submit(make_spec(), workplace)
    run = wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now)
    why = failures.explain(run)
    assert (run.state, why.code) == ("failed", "disk-full")
    assert "磁盘" in why.what("zh")
    assert "resume" in run.can


def test_a_disk_of_runs_that_is_full_to_the_last_byte_is_the_reason_too(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then neither error.json nor the log nor anything new can be written, only what was reserved."""
    saves = tmp_path / "small"
    source = (
        f"file = open({str(saves / 'filler')!r}, 'ab', buffering=0)\n"
        "for size in (65536, 1):\n    try:\n        while True: file.write(b'x' * size)\n    except OSError: pass\n"
        "raise SystemExit(1)"
    )
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, source))
    with mounted(saves, 64) as is_real:
        if not is_real:
            pytest.skip("no file system may be mounted")
        run = runs.submit(make_spec(), dataclasses.replace(workplace, saves=saves))
        run = wait_until(lambda: (now := runs.get(saves, run.id)).state not in ALIVE_STATES and now)
        assert (run.state, failures.explain(run).code) == ("failed", "disk-full")
        assert not run.dir.reserve.exists()
        assert "resume" in run.can


def test_a_disk_that_is_full_at_submit_leaves_no_half_a_run(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_text", full)
    with pytest.raises(Refusal, match="No space left"):
        runs.submit(make_spec(), workplace)
    assert list(workplace.saves.glob("*/*/*")) == []


def test_a_run_waits_for_space_on_a_disk_that_is_nearly_full(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing at once would let all runs that wait behind it fail, too."""
    saves, started = tmp_path / "small", tmp_path / "started"
    source = f"open({str(started)!r}, 'w').close(); raise SystemExit(1)"
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, source))
    with mounted(saves, 64) as is_real:
        if not is_real:
            pytest.skip("no file system may be mounted")
        with monkeypatch.context() as patch:
            patch.setattr(queue, "advance", lambda *_: None)
            run = runs.submit(make_spec(), dataclasses.replace(workplace, saves=saves))
        with (saves / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while hardware.free_disk(saves) > 32_768:
                filler.write(b"x" * 4096)
        queue.advance(saves)
        wait_until(lambda: not run.dir.alive())
        assert runs.get(saves, run.id).state == "queued"
        assert not started.exists()
        (saves / "filler").unlink()
        queue.advance(saves)
        wait_until(lambda: runs.get(saves, run.id).final)
        assert started.exists()


@pytest.mark.parametrize(("error", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)])
def test_only_a_full_disk_or_quota_keeps_a_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, full: bool
) -> None:
    """Some file systems, such as those of other machines, cannot reserve space at all."""

    def reserve(*_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    assert supervisor.reserve_space(RunDir(tmp_path)) is not full


@pytest.mark.parametrize(("error", "reason"), [(errno.EDQUOT, "disk-full"), (errno.EACCES, "no-keeper")])
def test_a_quota_that_is_used_up_is_the_reason(tmp_path: Path, error: int, reason: str) -> None:
    write_json(RunDir(tmp_path).request, {"attempt": 1})
    supervisor.give_up(RunDir(tmp_path), OSError(error, os.strerror(error)))
    assert read_json(RunDir(tmp_path).exit)["reason"] == reason
