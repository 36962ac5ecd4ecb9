"""training_loss.png: train and validation loss, raw and smoothed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from engine.core.smoothing import exponential_moving_average


def plot_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot the losses of a metrics file; a later line for a step replaces an earlier one."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, label, colour in (("loss", "train", "#c2410c"), ("eval_loss", "validation", "#0f766e")):
        points = {line["step"]: line[name] for line in lines if line.get(name) is not None}
        steps = sorted(points)
        values = [points[step] for step in steps]
        if len(values) > 2:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, exponential_moving_average(values), color=colour, linewidth=1.8, label=label)
        elif values:
            axes.plot(steps, values, "o-", color=colour, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
