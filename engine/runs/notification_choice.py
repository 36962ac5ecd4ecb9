"""Whether its owner is notified of a run: noted in its request, since it has no effect on the training."""

from __future__ import annotations

import time
from typing import Any

from engine.core.rundir import read_to_change, write_json
from engine.runs import queue, runs
from engine.runs.run import Run


def choose(run: Run, on: bool, by: str = "") -> None:
    """Switch notifications about a run on or off. What has happened before they are switched on is not sent. Raises
    Refusal."""
    saves = queue.saves_of(run.path)
    with runs.refusing_write_errors(saves), queue.locked(saves):
        request: dict[str, Any] = read_to_change(run.dir.request, {})
        write_json(run.dir.request, request | {"notifications": {"on": on, "by": by, "at": time.time()}})
