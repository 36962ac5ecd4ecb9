"""Programs that stop in the middle and stay there until they are killed, for tests of what a kill leaves: on a machine
that does much else, they would end by themselves before the test has its turn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.launch.workspace import PROJECT

START = """
import sys, time
from engine.core import rundir
real, calls = rundir.{function}, []
def held(path, content, *others, **options):
    real(path, content, *others, **options)
    calls.extend([path] if {condition} else [])
    if len(calls) == {count}:
        time.sleep(900)
for module in [*sys.modules.values()]:  # of a forked process, some have imported it already
    if getattr(module, "__dict__", {{}}).get("{function}") is real:
        module.{function} = held
"""


def sleep_after(monkeypatch: pytest.MonkeyPatch, folder: Path, function: str, condition: str, count: int = 1) -> None:
    """Programs of ours that start from now on sleep for a quarter of an hour when a function of `engine.core.rundir`
    has written what `condition` describes, an expression of `path` and `content`, for the `count`th time.

    `folder` is one that is not there yet. A run that is resumed sleeps again, unless the variable PYTHONPATH is undone.
    """
    folder.mkdir()
    start = START.format(function=function, condition=condition, count=count)
    (folder / "sitecustomize.py").write_text(start, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(folder)]))
