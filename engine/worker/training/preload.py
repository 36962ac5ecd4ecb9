"""Import the libraries of a training while its rows are still being prepared."""

from __future__ import annotations

import importlib

from engine.spec.run_spec import RunSpec


def import_libraries(spec: RunSpec) -> None:
    """Import what training `spec` needs. Touches no device."""
    for name in (
        "datasets",
        "engine.worker.training.callbacks",
        "engine.worker.models.loading",
        "engine.worker.training.result",
    ):
        importlib.import_module(name)
    from engine.worker.training.trainers import trainer_of

    trainer_of(spec.stage.kind)
