"""The libraries of a training: imported early, and without those that it has no use for."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator

from engine.models import inspect
from engine.obstacles import packages
from engine.spec import RunSpec

UNUSED_UNLESS_ASKED = "bitsandbytes"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keep the cyclic garbage collector from looking, while modules are imported: it would go through hundreds of
    thousands of new objects again and again, a quarter of the whole time, and find that nearly all are in use. Once in
    the life of a process: whatever is garbage at the end is kept for good, too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # and later they are none of its business
        gc.enable()


def leave_out_unused(spec: RunSpec) -> None:
    """Hide from this process, for good, what others import wherever it is installed.

    bitsandbytes takes a second and fails where it does not fit the driver: a run that quantizes nothing does not see it.
    """
    if not _quantizes(spec):
        sys.modules[UNUSED_UNLESS_ASKED] = None  # type: ignore[assignment]  # for whoever asks it is not installed


def import_libraries(spec: RunSpec) -> None:
    """Import what training `spec` needs. Touches no device."""
    for name in ("datasets", "engine.worker.metrics", "engine.worker.model", "engine.worker.result"):
        importlib.import_module(name)
    from engine.worker.trainers import trainer_of

    trainer_of(spec.stage.kind)


def _quantizes(spec: RunSpec) -> bool:
    """Whether the run may meet quantized weights: its own, or those of a model that judges or is not here yet."""
    model = spec.model.model_name_or_path
    return (
        UNUSED_UNLESS_ASKED in {module for _, module, _ in packages(spec)}
        or bool(getattr(spec.stage, "reward_model", ""))
        or not os.path.isdir(model)
        or inspect(model).quantized is not None
    )
