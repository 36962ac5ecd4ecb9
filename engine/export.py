"""ExportSpec: which weights are made of which results, in which form."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from engine.problems import Problem
from engine.spec import Hardware, Model, Spec, setting
from engine.workplace import Workplace


class ExportSpec(Spec):
    """Everything needed to repeat an export."""

    kind: ClassVar[str] = "export"

    name: str = setting("", "Name", "A few words to find it again. May be empty.", max_length=80)
    model: Model = Field(default_factory=Model)
    hardware: Hardware = Field(default_factory=Hardware)


def frozen(spec: ExportSpec, workplace: Workplace) -> ExportSpec:
    """The spec with every path absolute."""
    return spec


def problems(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    """Everything that would keep it from running here."""
    return []
