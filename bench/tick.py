"""The cost of the page's two-second tick for a very long run, with the handler that the page calls.

Runs as a separate process, `python -m bench.tick FOLDER`, so that nothing else is in the measured memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.bigrun import RUN, BigRun
from bench.server import MB, wait_until_quiet
from engine.core.rundir import RunDir
from engine.core.smoothing import SMOOTHING
from engine.launch.workspace import PROJECT, Workplace

TICKS = 200
VIEW = ("step", SMOOTHING, False)  # the default axis, smoothing and scale of the page


def handler(saves: Path, name: str) -> Callable[..., dict[Any, Any]]:
    """One of the page's handlers, as Gradio has it: a method, by its qualified name."""
    from webui.studio import page

    blocks = page(Workplace(saves=saves), "en")
    return next(event.fn for event in blocks.fns.values() if getattr(event.fn, "__qualname__", "") == name)


def measure(saves: Path) -> dict[str, float]:
    """Seconds of the first tick, milliseconds of the later ones, growth of the memory; there is a new line for each
    tick."""
    run = BigRun(saves)
    tick, here = handler(saves, "RunView.tick"), psutil.Process()
    stamp_box = tick.__self__.stamp
    wait_until_quiet()
    began = time.perf_counter()
    stamp = tick(run.id, "", *VIEW)[stamp_box]
    first, took, computed, before = time.perf_counter() - began, [], [], here.memory_info().rss
    for _ in range(TICKS):
        run.add()
        began, worked = time.perf_counter(), time.thread_time()
        changed = tick(run.id, stamp, *VIEW).get(stamp_box)
        took.append(time.perf_counter() - began)
        computed.append(time.thread_time() - worked)
        assert isinstance(changed, str), "the tick has not seen the new line"
        stamp = changed
    grown = here.memory_info().rss - before
    began = time.perf_counter()
    tick(run.id, stamp, *VIEW)
    still = time.perf_counter() - began
    took.sort()
    run.close()
    return {
        "first_s": first,
        "tick_ms": statistics.median(took) * 1000,
        "slow_ms": took[int(len(took) * 0.95)] * 1000,
        "computed_ms": statistics.median(computed) * 1000,
        "still_ms": still * 1000,
        "grown_mb": grown / MB,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB,
    }


def measure_in_process(saves: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    return last_json([sys.executable, "-m", "bench.tick", str(saves)])


def measure_peer(saves: Path, python: Path) -> dict[str, float]:
    """The peer's tick with the run that `measure` has left in `saves`."""
    run = RunDir(saves / RUN)
    script = str(PROJECT / "bench" / "peer_tick.py")
    return last_json([str(python), script, str(run.metrics), str(run.log)], saves)


def last_json(command: list[str], folder: Path = PROJECT) -> dict[str, float]:
    """The last JSON that a command prints."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
