"""Trainings that wait at a step until a test lets them go on: they cannot end by themselves before it stops them. So
can their preparation.

The processes of a run find `sitecustomize.py` in PYTHONPATH. Python runs it when it starts; so do forked programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.rundir import RunDir, write_text
from tests.preloaded import PROJECT

HOLD_FILE = "hold-at-step"  # in the folder of a run: the phase, and the number of the step
START = f"""\
import time
from engine.worker.runtime.process_lifecycle import ProgressReport
report = ProgressReport.__call__
def report_and_wait(self, phase, done=0, *others, **details):
    def holds():
        try:
            held, step = (self.run.path / "{HOLD_FILE}").read_text().split()
            return phase == held and done >= int(step)
        except (FileNotFoundError, ValueError):
            return False
    if holds():
        self.due = 0.0
    report(self, phase, done, *others, **details)
    while holds():
        time.sleep(0.02)
ProgressReport.__call__ = report_and_wait
"""


def hold_at(run: RunDir, step: int, phase: str = "training") -> None:
    """Let every process of a training wait once it has taken so many steps of a phase; to be said before that begins,
    or while the run is held in another."""
    write_text(run.path / HOLD_FILE, f"{phase} {step}")


def release(run: RunDir) -> None:
    """Let it go on, to its end."""
    (run.path / HOLD_FILE).unlink()


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunDir, int], None]:
    """`hold_at`, for trainings of this test."""
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(START, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(PROJECT), str(folder))))
    return hold_at
