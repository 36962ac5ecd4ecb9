"""Where weights come from: the trainings that they went through, found by what each run started from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engine.core import regular_files
from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.export.export_spec import ExportSpec
from engine.runs import kinds
from engine.spec.run_spec import RunSpec, Spec


class Training(NamedTuple):
    run: RunDir
    spec: RunSpec


def trainings(folders: Iterable[str | Path]) -> list[Training]:
    """The trainings behind the weights in `folders`, each after the one it started from. The chain ends where a run no
    longer exists, or is not one of ours."""
    lineage: list[Training] = []
    seen: set[Path] = set()

    def follow(folder: str | Path) -> None:
        run = RunDir(Path(os.path.realpath(folder)).parent)
        if run.path in seen:  # two chains may share a run, and a spec may have been edited to refer to itself
            return
        seen.add(run.path)
        spec = _spec(run)
        for before in _starting_weights(spec) if spec else ():
            follow(before)
        if isinstance(spec, RunSpec):
            lineage.append(Training(run, spec))

    for folder in folders:
        follow(folder)
    return lineage


def learned(folders: Iterable[str | Path]) -> set[tuple[str, str]]:
    """The data sets that the weights in `folders` were trained on, each as (data folder, name)."""
    return {
        (os.path.realpath(spec.data.dataset_dir), name) for _, spec in trainings(folders) for name in spec.data.datasets
    }


def adapts_vision(folder: str | Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether the adapter in `folder`, or one that it continues or combines, is also on vision tower or projector, as
    far as the runs behind it still exist."""
    run = RunDir(Path(os.path.realpath(folder)).parent)
    spec = None if run.path in seen else _spec(run)
    if isinstance(spec, ExportSpec):
        return any(adapts_vision(adapter, seen | {run.path}) for adapter in spec.adapters)
    if not isinstance(spec, RunSpec):
        return False
    before = spec.model.adapter_path
    return spec.vision.has_adapter or bool(before and adapts_vision(before, seen | {run.path}))


def _spec(run: RunDir) -> Spec | None:
    try:
        return kinds.read(regular_files.read_text(run.spec))
    except (OSError, ValueError, Refusal):
        return None


def _starting_weights(spec: Spec) -> list[str]:
    adapters = list(spec.adapters) if isinstance(spec, ExportSpec) else [spec.model.adapter_path]
    return [folder for folder in (*adapters, spec.model.model_name_or_path) if folder]
