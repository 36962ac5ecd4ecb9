"""How one looks at the compared runs: which curve, over which axis, how smooth, and in which groups."""

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
    """`metric` is the name of the curve, `by` the path of the setting that runs are grouped by; "" = none."""

    metric: str = ""
    x: str = "step"
    smoothing: float = SMOOTHING
    log: bool = False
    by: str = ""

    @classmethod
    def of_controls(cls, metric: Any, x: Any, smoothing: Any, log: Any, by: Any) -> View:
        return cls(metric or "", known_axis(x), smoothing_of(str(smoothing)), bool(log), by or "")

    @classmethod
    def of_address(cls, parameters: Mapping[str, Sequence[str]]) -> View:
        """The view that the parameters of an address describe, as page.js writes them."""
        last = {name: values[-1] for name, values in parameters.items()}
        smoothing = smoothing_of(last.get("smooth", ""))
        return cls(
            last.get("curve", ""), known_axis(last.get("x")), smoothing, "log" in last, last.get("by", "")
        )

    def fitted(self, metrics: Sequence[str], group_paths: Collection[str]) -> View:
        """The view that the runs can be shown in: a curve that none of them has is replaced by the first of `metrics`, and a
        grouping that is not among `group_paths` by none."""
        metric = self.metric if self.metric in metrics else next(iter(metrics), "")
        return replace(self, metric=metric, by=self.by if self.by in group_paths else "")


def known_axis(x: Any) -> str:
    return x if x in charts.AXES else "step"


def smoothing_of(text: str) -> float:
    """The smoothing that an address or a control holds; the default where it is not a number."""
    try:
        value = float(text)
    except ValueError:
        return SMOOTHING
    return min(max(value, 0.0), MAX_SMOOTHING) if np.isfinite(value) else SMOOTHING
