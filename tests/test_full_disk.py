"""A disk that is too small, met before the start and in the middle: a sentence, and nothing lost."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.core import hardware
from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.runs import failures, queue, runs
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real file system of two megabytes; where one may not be mounted, only the answer about free space is small."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        monkeypatch.setattr(hardware, "free_disk", lambda path: 2_000_000)
    yield folder
    if not mounted.returncode:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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
    run = wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now, 30)
    why = failures.explain(run)
    assert (run.state, why.code) == ("failed", "disk-full")
    assert "磁盘" in why.what("zh")
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
