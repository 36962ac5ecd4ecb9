"""Hide packages that a process does not need from the libraries that would import them."""

from __future__ import annotations

import importlib.util
import sys

from engine.preflight.package_checks import QUANTIZER


def hide_unused_packages(quantizes: bool) -> None:
    """Hide from this process, permanently, what libraries import wherever it is installed.

    bitsandbytes takes a second and fails if it does not fit the driver: a run that quantizes nothing does not see it.
    """
    if not quantizes:
        sys.modules[QUANTIZER] = None  # type: ignore[assignment]  # as if it were not installed


def is_quantization_hidden() -> bool:
    """Whether this process can no longer have quantized weights."""
    return sys.modules.get(QUANTIZER, sys) is None


def hide_torch() -> None:
    """transformers loads torch wherever it is installed, which takes longer than everything that a process without
    models needs of it."""
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
