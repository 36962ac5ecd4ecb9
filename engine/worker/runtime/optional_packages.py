"""Hide packages that a process does not need from the libraries that would import them."""

from __future__ import annotations

import sys

from engine.models.facts import may_need_bitsandbytes
from engine.preflight.package_checks import required_packages
from engine.spec.model_settings import Model
from engine.spec.run_spec import RunSpec

QUANTIZATION_PACKAGE = "bitsandbytes"


def hide_unused_packages(quantizes: bool) -> None:
    """Hide from this process, permanently, what libraries import wherever it is installed.

    bitsandbytes takes a second and fails if it does not fit the driver: a run that quantizes nothing does not see it.
    """
    if not quantizes:
        sys.modules[QUANTIZATION_PACKAGE] = None  # type: ignore[assignment]  # as if it were not installed


def is_quantization_hidden() -> bool:
    """Whether this process can no longer have quantized weights."""
    return sys.modules.get(QUANTIZATION_PACKAGE, sys) is None


def trains_quantized(spec: RunSpec) -> bool:
    """Whether a training may use quantized weights, including those of a reward model."""
    modules = {module for _, module, _ in required_packages(spec)}
    return QUANTIZATION_PACKAGE in modules or bool(getattr(spec.stage, "reward_model", "")) or quantized(spec.model)


def quantized(model: Model) -> bool:
    return may_need_bitsandbytes(model.model_name_or_path, model.quantization.kind)
