"""The specs in examples/: each is sound, and nothing stands in its way here but what it says itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.core.stages import STAGES
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import kinds
from engine.spec.method_settings import METHODS

EXAMPLES = sorted((PROJECT / "examples").glob("*.yaml"))
# What an example needs that a fresh installation may lack; it says so in its first lines.
LACKING = {"ppo": {"stage.reward_model"}, "sft_qlora": {"model.quantization"}}


def spec_of(file: Path) -> kinds.Spec:
    return kinds.read(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_can_be_started_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    kind = kinds.KINDS[(spec := spec_of(file)).kind]
    workplace = Workplace()
    problems = kind.problems(kind.frozen(spec, workplace), workplace)
    assert {problem.field for problem in problems} <= LACKING.get(file.stem, set()), problems


def test_there_is_an_example_of_every_stage_method_and_kind_of_run() -> None:
    specs = [spec_of(file) for file in EXAMPLES]
    trainings = [spec for spec in specs if spec.kind == "training"]
    assert {spec.kind for spec in specs} == set(kinds.KINDS)
    assert {spec.stage.kind for spec in trainings} == set(STAGES)
    assert {spec.method.kind for spec in trainings} == set(METHODS)
    assert any(spec.model.quantization.kind == "4bit" for spec in trainings)


def test_the_readme_lists_every_example() -> None:
    readme = (PROJECT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in EXAMPLES if f"({file.name})" not in readme] == []
