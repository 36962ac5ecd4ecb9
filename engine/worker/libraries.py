"""The libraries of a training: imported early, and without those that it has no use for."""

from __future__ import annotations

import importlib
import os
import sys

from engine.models import inspect
from engine.obstacles import packages
from engine.spec import Model, RunSpec

UNUSED_UNLESS_ASKED = "bitsandbytes"


def leave_out_unused(quantizes: bool) -> None:
    """Hide from this process, for good, what others import wherever it is installed.

    bitsandbytes takes a second and fails where it does not fit the driver: a run that quantizes nothing does not see it.
    """
    if not quantizes:
        sys.modules[UNUSED_UNLESS_ASKED] = None  # type: ignore[assignment]  # for whoever asks it is not installed


def trains_quantized(spec: RunSpec) -> bool:
    """Whether a training may meet quantized weights, those of a model that judges included."""
    asked = {module for _, module, _ in packages(spec)}
    return (
        UNUSED_UNLESS_ASKED in asked or bool(getattr(spec.stage, "reward_model", "")) or quantized(spec.model)
    )


def quantized(model: Model) -> bool:
    """Whether the model may have quantized weights: it is loaded so, lies so on disk, or is not here yet."""
    path = model.model_name_or_path
    return model.quantization.kind != "none" or not os.path.isdir(path) or inspect(path).quantized is not None


def import_libraries(spec: RunSpec) -> None:
    """Import what training `spec` needs. Touches no device."""
    for name in ("datasets", "engine.worker.metrics", "engine.worker.model", "engine.worker.result"):
        importlib.import_module(name)
    from engine.worker.trainers import trainer_of

    trainer_of(spec.stage.kind)
