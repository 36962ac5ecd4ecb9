"""Packages that a process has no use for, hidden from the libraries that would import them."""

from __future__ import annotations

import sys

from engine.models.facts import may_be_quantized
from engine.preflight.checks import packages
from engine.spec.model_settings import Model
from engine.spec.run_spec import RunSpec

UNUSED_UNLESS_ASKED = "bitsandbytes"


def leave_out_unused(quantizes: bool) -> None:
    """Hide from this process, for good, what others import wherever it is installed.

    bitsandbytes takes a second and fails where it does not fit the driver: a run that quantizes nothing does not see it.
    """
    if not quantizes:
        sys.modules[UNUSED_UNLESS_ASKED] = None  # type: ignore[assignment]  # for whoever asks it is not installed


def left_out() -> bool:
    """Whether this process cannot have quantized weights any more."""
    return sys.modules.get(UNUSED_UNLESS_ASKED, sys) is None


def trains_quantized(spec: RunSpec) -> bool:
    """Whether a training may meet quantized weights, those of a model that judges included."""
    asked = {module for _, module, _ in packages(spec)}
    return (
        UNUSED_UNLESS_ASKED in asked or bool(getattr(spec.stage, "reward_model", "")) or quantized(spec.model)
    )


def quantized(model: Model) -> bool:
    return may_be_quantized(model.model_name_or_path, model.quantization.kind)
