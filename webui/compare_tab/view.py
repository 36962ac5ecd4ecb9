"""How the compared runs are shown: which curve, over which axis, how much smoothing, grouped by what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.core.smoothing import SMOOTHING
from webui import charts

MAX_SMOOTHING = 0.99


@dataclass(frozen=True)
class View:
    """`metric` is the name of a curve, `by` the path of a setting or BY_NAME; "" means none."""

    metric: str = ""
    x: str = "step"
    smoothing: float = SMOOTHING
    log: bool = False
    by: str = ""
    zoom: str = ""  # see `charts.part_of`

    @classmethod
    def of_controls(cls, metric: Any, x: Any, smoothing: Any, log: Any, by: Any, zoom: Any = "") -> View:
        return cls(metric or "", known_axis(x), smoothing_of(str(smoothing)), bool(log), by or "", str(zoom or ""))

    @classmethod
    def of_address(cls, parameters: Mapping[str, Sequence[str]]) -> View:
        """Read the parameters that page.js writes into the address."""
        last = {name: values[-1] for name, values in parameters.items()}
        smoothing = smoothing_of(last.get("smooth", ""))
        return cls(last.get("curve", ""), known_axis(last.get("x")), smoothing, "log" in last, last.get("by", ""))

    def fitted(self, metrics: Sequence[str], group_paths: Collection[str]) -> View:
        """Replace a curve that is not in `metrics` by the first that is, and a
        grouping that is not in `group_paths` by none."""
        metric = self.metric if self.metric in metrics else next(iter(metrics), "")
        return replace(self, metric=metric, by=self.by if self.by in group_paths else "")


def known_axis(x: Any) -> str:
    return x if x in charts.AXES else "step"


def smoothing_of(text: str) -> float:
    """The smoothing as a number within its limits; the default if `text` is not a number."""
    try:
        value = float(text)
    except ValueError:
        return SMOOTHING
    return min(max(value, 0.0), MAX_SMOOTHING) if np.isfinite(value) else SMOOTHING
