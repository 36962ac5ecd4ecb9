"""Weights are followed back to all that they learned from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.rundir import write_text
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.lineage import learned, trainings
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.past_runs import past_run


@pytest.fixture
def run(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> Callable[..., Run]:
    """A run that learned from the set that is called as it is."""

    def run_(name: str, **settings: object) -> Run:
        spec = make_spec(name=name, data__datasets={name: 1.0}, **settings)
        return past_run(workplace.saves, spec)

    return run_


def exported(saves: Path, name: str, base: str | Path, *adapters: Path) -> Path:
    folder = saves / "tiny" / "export" / name / "model"
    folder.mkdir(parents=True)
    spec = ExportSpec.read(
        {"model": {"model_name_or_path": str(base)}, "adapters": {str(one): 1.0 for one in adapters}}
    )
    write_text(folder.parent / "spec.yaml", spec.to_yaml())
    return folder


def names(*folders: Path | str) -> list[str]:
    return [spec.name for _, spec in trainings(folders)]


def test_a_run_comes_after_what_it_continued_and_after_the_whole_model_it_began_with(
    workplace: Workplace, run: Callable[..., Run], tiny: Path
) -> None:
    first, beside = run("first"), run("beside")
    second = run("second", model__adapter_path=str(first.dir.adapter))
    merged = exported(workplace.saves, "merged", tiny, second.dir.adapter, beside.dir.adapter)
    quantized = exported(workplace.saves, "quantized", merged)
    last = run("last", model__model_name_or_path=str(quantized))
    assert names(last.dir.adapter) == ["first", "second", "beside", "last"]
    assert names(beside.dir.adapter, second.dir.adapter) == ["beside", "first", "second"]
    assert names(second.path / "checkpoint-5") == ["first", "second"]
    data = os.path.realpath(second.spec.data.dataset_dir)
    assert learned([quantized]) == {(data, "first"), (data, "second"), (data, "beside")}


def test_a_run_of_a_merged_model_is_beside_those_of_its_base(
    workplace: Workplace, run: Callable[..., Run], tiny: Path, make_spec: Callable[..., RunSpec]
) -> None:
    merged = exported(workplace.saves, "merged", tiny, run("first").dir.adapter)
    spec = make_spec(model__model_name_or_path=str(merged), name="next")
    assert runs.new_folder(spec, workplace.saves).parent == workplace.saves / "tiny" / "lora"


def test_a_line_ends_at_what_is_gone_or_is_no_run_and_a_circle_is_gone_round_once(
    workplace: Workplace, run: Callable[..., Run], tiny: Path, tmp_path: Path
) -> None:
    assert names(tiny, "org/model", tmp_path / "nowhere", "") == []
    (tmp_path / "spec.yaml").write_bytes(b"\xff\xfe a: [")
    assert names(tmp_path / "model") == []
    own = workplace.saves / "tiny" / "lora" / "own" / "adapter"
    assert names(run("own", model__adapter_path=str(own)).dir.adapter) == ["own"]
    after = run("after", model__adapter_path=str(tmp_path / "gone" / "adapter"))
    assert names(after.dir.adapter) == ["after"]
