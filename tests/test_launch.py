"""The launcher of a training: it imports early, waits for its turn, and is itself the one process that trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.rundir import RunDir, write_text
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import RunSpec

LOOK = """
import sys
from engine.preflight.package_checks import trains_quantized
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.training.preload import import_libraries
spec = RunSpec.from_yaml(sys.stdin.read())
hide_unused_packages(trains_quantized(spec))
import_libraries(spec.stage.kind)
import torch
print(sys.modules["bitsandbytes"] is not None, torch.cuda.is_initialized())
"""


def loaded(spec: RunSpec) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOOK], input=spec.to_yaml(), cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_only_a_run_that_quantizes_meets_bitsandbytes_and_none_takes_a_device(
    make_spec: Callable[..., RunSpec],
) -> None:
    assert loaded(make_spec()) == "False False"
    assert loaded(make_spec(model__quantization={"kind": "4bit"})) == "True False"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_launcher_whose_keeper_is_gone_trains_nothing(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    spec = make_spec()
    write_text(run.spec, spec.to_yaml())
    words = command.train_command(spec, run.path, 0, gpu_count=0)
    environment = os.environ | {command.WAIT_VARIABLE: "1"}
    done = subprocess.run(words, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0
    assert [path.name for path in run.path.iterdir()] == ["spec.yaml"]
