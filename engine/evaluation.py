"""EvaluationSpec: what is measured of a base model and of the results of runs, on which rows."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from engine.problems import Problem
from engine.spec import Hardware, Model, Spec, setting
from engine.workplace import Workplace


class EvaluationSpec(Spec):
    """Everything needed to repeat an evaluation."""

    kind: ClassVar[str] = "evaluation"

    name: str = setting("", "Name", "A few words to find it again. May be empty.", max_length=80)
    model: Model = Field(default_factory=Model)
    hardware: Hardware = Field(default_factory=Hardware)


def frozen(spec: EvaluationSpec, workplace: Workplace) -> EvaluationSpec:
    """The spec with every path absolute."""
    return spec


def problems(spec: EvaluationSpec, workplace: Workplace) -> list[Problem]:
    """Everything that would keep it from running here."""
    return []
