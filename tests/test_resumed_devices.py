"""A run that is resumed gets the devices that there are now, whoever is killed while resuming it. Nothing computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware
from engine.core.hardware import Node
from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import read_json, write_json, write_text
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.preflight.strategy import write_configuration
from engine.runs import queue, runs
from engine.runs.run import Run
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.yaml_text import read_yaml
from tests.nvml import Nvml
from tests.past_runs import past_run
from tests.train_many import lay_out

GB = 1 << 30
MODEL = {"model": {"model_name_or_path": "org/base"}}
SPECS: dict[str, Spec] = {
    "training": RunSpec.read(MODEL | {"data": {"datasets": ["names"]}, "hardware": {"device": "auto"}}),
    "evaluation": EvaluationSpec.read(MODEL | {"data": {"datasets": ["names"]}}),
    "export": ExportSpec.read(MODEL | {"adapters": ["gone"]}),
}


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Eight GPUs; nothing is started on them."""
    nvml = Nvml(tmp_path / "library", monkeypatch)
    nvml.report(gpus=[{"uuid": f"GPU-{number}", "memory": 80 * GB, "free": 79 * GB} for number in range(8)])
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    return nvml


def ended(saves: Path, spec: Spec) -> Run:
    """A run that was submitted when nothing limited the GPUs, and has failed."""
    fields = queue.demand_fields(spec, 0)
    if isinstance(spec, RunSpec):
        folder = past_run(saves, spec.change("name", "past"), outcome="failed").dir
    else:
        folder = lay_out(runs.RunDir(saves / "base" / spec.shelf / "past"), spec)
        write_json(folder.keeper, {"started": 1e9})
    write_json(folder.exit, {"outcome": "failed", "reason": "exit", "ended": 1e9 + 60, "attempt": 1})
    write_json(folder.request, read_json(folder.request) | {"devices": fields})
    return runs.read(folder.path, saves)


@pytest.mark.parametrize("kind", SPECS)
def test_a_run_continues_on_the_gpus_that_the_studio_has_now(
    eight_gpus: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = ended(tmp_path, SPECS[kind])
    assert run.request["devices"]["allowed"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    runs.resume(run)
    demand = queue.demand(runs.read(run.path, tmp_path))
    assert (demand.count, demand.allowed) == (1, {"GPU-4", "GPU-5", "GPU-6", "GPU-7"})
    assert read_warnings(run.dir) == []
    assert "processes" not in read_json(run.dir.request)  # it was not moved to another number of them


@pytest.mark.parametrize("kind", SPECS)
def test_a_run_for_the_cpu_continues_on_gpus_once_there_are_some_and_the_other_way_round(
    eight_gpus: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(hardware, "_node", lambda: Node())  # engine.yaml does not say how many GPUs a machine has
    run = ended(tmp_path, SPECS[kind])
    assert run.request["devices"]["count"] == 0
    past = {file: file.read_text() for file in (run.dir.keeper, run.dir.exit)}
    for node, count, code in (
        (lambda: Node(gpus=hardware.all_gpus()), 1, "resumed-on-gpus"),
        (lambda: Node(), 0, "resumed-on-cpu"),
    ):
        monkeypatch.setattr(hardware, "_node", node)
        runs.resume(runs.read(run.path, tmp_path))
        assert read_json(run.dir.request)["devices"]["count"] == count
        assert read_warnings(run.dir)[-1].problem.code == code
        for file, text in past.items():
            write_text(file, text)


def test_while_the_driver_fails_nothing_is_resumed_on_the_cpu(eight_gpus: Nvml, tmp_path: Path) -> None:
    run = ended(tmp_path, SPECS["training"])
    eight_gpus.report(error="Driver/library version mismatch")
    with pytest.raises(Refusal, match="version mismatch"):
        runs.resume(run)
    assert runs.read(run.path, tmp_path).request == run.request


class Killed(BaseException):
    """What no code handles."""


def kill_at(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """End this process in effect before its file operation of this number."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == place:
                raise Killed
            return operation(*arguments)

        return operate

    for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("begun", [True, False])
def test_whenever_resuming_with_more_processes_is_killed_the_next_resume_is_consistent(
    eight_gpus: Nvml, tmp_path: Path, begun: bool
) -> None:
    two = SPECS["training"].change("hardware", {"num_processes": 2, "strategy": "ddp"})
    four = two.change("hardware", {"num_processes": 4, "strategy": "ddp"})
    seen = set()
    for place in range(1, 100):
        saves = tmp_path / str(place)
        run = ended(saves, two)
        write_configuration(two, run.path, 2)
        if begun:
            (run.path / "checkpoint-3").mkdir()
            write_json(run.path / "checkpoint-3" / "complete.json", {"step": 3, "done": False})
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, place)
            try:
                runs.resume(run, spec=four)
                break
            except Killed:
                pass
        assert runs.state(run.dir) == "failed"  # nobody starts it meanwhile
        runs.resume(runs.read(run.path, saves))
        now = runs.read(run.path, saves)
        count = now.spec.hardware.num_processes
        seen.add(count)
        assert now.state == "queued"
        assert now.dir.attempt() == 2
        assert queue.demand(now).count == count
        assert read_json(now.dir.attempts / "1" / "exit.json")["outcome"] == "failed"
        if begun:
            assert read_yaml(now.dir.accelerate.read_text())["num_processes"] == count
            assert now.request.get("processes", 2) == 2  # for which the order of its rows was made
        else:
            assert not now.dir.accelerate.exists()
            assert now.request.get("processes", count) == count
    assert place > 5
    assert seen == {2, 4}
    assert runs.read(run.path, saves).spec.hardware.num_processes == 4
