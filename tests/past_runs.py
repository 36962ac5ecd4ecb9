"""Runs as training leaves them, written without training: a spec, metrics, and how it ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.core.rundir import RunDir, write_json, write_text
from engine.runs import runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec

Line = Mapping[str, Any]


def past_run(
    saves: Path, spec: RunSpec, lines: Iterable[Line] = (), outcome: str | None = "finished", at: float = 1e9
) -> Run:
    """A run below `saves`, in a folder called as the spec is. Without an outcome it was interrupted."""
    folder = RunDir(saves / Path(spec.model.model_name_or_path).name / spec.method.kind / spec.name)
    folder.path.mkdir(parents=True)
    write_text(folder.spec, spec.to_yaml())
    if lines := list(lines):
        write_text(folder.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder.keeper, {"started": at})
    if outcome:
        ended = {"outcome": outcome, "reason": outcome, "ended": at + 60, "peak_memory": 10**9}
        write_json(folder.exit, ended)
    if outcome == "finished":
        left = folder.adapter if spec.method.kind == "lora" else folder.model
        left.mkdir()
        write_json(left / "result.json", {"attempt": 1, "stage": spec.stage.kind, "complete": True})
    write_json(folder.request, {"by": "", "submitted": at, "attempt": 1})
    return runs.read(folder.path, saves)


def run_maker(saves: Path) -> Callable[..., Run]:
    """Makes runs of one base below `saves`, each a second later than the last: by name, lines,
    and outcome as of `past_run`; further keywords are settings with `__` for the dot."""
    spec = RunSpec.read({"model": {"model_name_or_path": "org/base"}, "data": {"datasets": ["names"]}})
    number = itertools.count()

    def make(name: str, lines: Iterable[Line] = (), outcome: str | None = "finished", **changes: Any) -> Run:
        own = spec.change("name", name)
        for path, value in changes.items():
            own = own.change(path.replace("__", "."), value)
        return past_run(saves, own, lines, outcome, at=1e9 + next(number))

    return make


def falling(steps: int, end: float = 1.0, speed: float = 5.0, **more: Callable[[int], float]) -> list[dict[str, Any]]:
    """Lines of a loss that falls to `end`, of a validation every tenth step, and of whatever else is asked for."""
    lines = []
    for step in range(1, steps + 1):
        place = {"step": step, "epoch": step / steps, "time": step * 0.5}
        loss = end + 2 * math.exp(-speed * step / steps) + 0.1 * math.sin(step * 12.9898)
        extra = {name: value(step) for name, value in more.items()}
        lines.append(place | {"loss": loss, "num_tokens": step * 512.0} | extra)
        if step % 10 == 0:
            lines.append(place | {"eval_loss": loss + 0.2})
    return lines
