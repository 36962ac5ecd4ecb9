"""What a version before left in its saves folder, `old_saves.py`, still works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.core.rundir import RunDir
from engine.evaluation import report
from engine.launch.workspace import Workplace
from engine.runs import results, runs
from engine.runs.progress import curves
from tests.conftest import engine, wait_until
from tests.old_saves import CUT_OFF, TRAINED, extract, run_called

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    extract(tmp_path / "saves")
    return Workplace(saves=tmp_path / "saves")


def test_every_run_is_listed_in_the_state_that_it_had(workplace: Workplace) -> None:
    states = {(run.kind, run.path.name[20:]): run.state for run in runs.find(workplace.saves)}
    assert states == {
        ("training", TRAINED): "finished",
        ("training", CUT_OFF): "interrupted",
        ("evaluation", TRAINED): "finished",
        ("export", TRAINED): "finished",
    }


def test_specs_curves_and_reports_are_read(workplace: Workplace) -> None:
    run = run_called(workplace.saves, "training", TRAINED)
    assert (run.spec.name, run.spec.method.r, run.spec.training.max_steps) == ("before the move", 1, 6)
    lines = [json.loads(line) for line in run.dir.metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert list(curves(run)["loss"].value) == pytest.approx(losses)
    measured = run_called(workplace.saves, "evaluation", TRAINED)
    assert len(report.rows(measured.dir)) == 3
    assert run_called(workplace.saves, "export", TRAINED).spec.kind == "export"


def test_a_result_is_offered_to_go_on_from(workplace: Workplace) -> None:
    run = run_called(workplace.saves, "training", TRAINED)
    assert [result.run.id for result in results.results(workplace.saves) if result.stage == "sft"][-1] == run.id


def test_the_shell_knows_them(workplace: Workplace) -> None:
    listed = engine(workplace, "list")
    assert listed.returncode == 0
    assert TRAINED in listed.stdout
    assert CUT_OFF in listed.stdout
    assert engine(workplace, "show", run_called(workplace.saves, "training", CUT_OFF).path.name).returncode == 0


@pytest.mark.slow
def test_a_run_that_was_cut_off_is_resumed_to_the_weights_of_the_finished_one(workplace: Workplace) -> None:
    run = run_called(workplace.saves, "training", CUT_OFF)
    runs.resume(run)
    wait_until(lambda: runs.read(run.path, workplace.saves).final, 300)
    assert runs.read(run.path, workplace.saves).state == "finished"
    there = load_file(RunDir(run.path).adapter / "adapter_model.safetensors")
    before = load_file(run_called(workplace.saves, "training", TRAINED).dir.adapter / "adapter_model.safetensors")
    assert there.keys() == before.keys()
    for name, weights in before.items():
        assert np.abs(there[name] - weights).max() < 1e-4, name  # another processor may round differently
