"""Import the libraries of a training while its rows are still being prepared."""

from __future__ import annotations

import importlib


def import_libraries(stage: str) -> None:
    """Import what a training of this stage needs. Touches no device."""
    for name in (
        "datasets",
        "engine.worker.training.callbacks",
        "engine.worker.models.loading",
        "engine.worker.training.result",
    ):
        importlib.import_module(name)
    from engine.worker.training.trainers import trainer_of

    trainer_of(stage)
    # transformers makes this table of all architectures with the first model.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
