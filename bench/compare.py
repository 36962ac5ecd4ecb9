"""Time to draw ten runs of 100,000 points in one figure, with the handler that the page calls.

Runs as a separate process, `python -m bench.compare FOLDER`, which has not read any of the files before.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path

from bench.bigrun import BigRun
from bench.server import MB, wait_until_quiet
from bench.tick import handler, last_json
from engine.core.smoothing import SMOOTHING

RUNS, POINTS = 10, 100_000
REPEATS = 3
VIEW = ("loss", "step", SMOOTHING, False, "")  # curve, axis, smoothing, scale, group


def make(saves: Path) -> None:
    """The runs, each with six curves of this many points."""
    for number in range(RUNS):
        BigRun(saves, POINTS, log_bytes=1, id=f"bench/lora/run-{number}").close()


def measure(saves: Path) -> dict[str, float]:
    """Seconds until a fresh process has drawn the figure, the share spent on reading, and seconds to draw it again."""
    from engine.runs import compare

    draw, trainings = handler(saves, "draw"), compare.training_runs(saves)
    ids = [run.id for run in trainings]
    wait_until_quiet()
    began, worked = time.perf_counter(), time.process_time()
    compare.curves(trainings)
    read = time.perf_counter() - began
    outputs = draw(ids, *VIEW)
    first, computed = time.perf_counter() - began, time.process_time() - worked
    draw(ids, *VIEW)
    again = time.perf_counter() - began - first
    chart = next(output for output in outputs if isinstance(output, str) and output.startswith("<figure"))
    svg = re.search(r"<svg.*</svg>", chart, re.DOTALL)[0]
    return {
        "first_s": first,
        "computed_s": computed,
        "read_s": read,
        "again_s": again,
        "svg_mb": len(svg.encode()) / MB,
        "sent_mb": sum(len(output.encode()) for output in outputs if isinstance(output, str)) / MB,
    }


def measure_in_processes(saves: Path) -> dict[str, float]:
    """`measure` in fresh processes: with runs that have never been read, and the medians of a few later ones
    ("later_")."""
    make(saves)
    first, *later = (last_json([sys.executable, "-m", "bench.compare", str(saves)]) for _ in range(1 + REPEATS))
    return first | {f"later_{name}": statistics.median(measured[name] for measured in later) for name in first}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
