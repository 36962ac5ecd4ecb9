"""Time to list many runs in the saves folder, with and without the index: `python -m bench.many_runs [COUNT]`."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.figures import Figure, table

COUNT = 10_000
LOOKS = 9  # the median of these is reported
MODELS = 7  # folders that contain the runs


def build(saves: Path, count: int) -> None:
    """Finished runs with spec, 200 lines of metrics and a result, as training leaves them."""
    from engine.spec.run_spec import RunSpec
    from tests.past_runs import falling, past_run

    spec = RunSpec.read(
        {"name": "first", "model": {"model_name_or_path": "/models/base"}, "data": {"datasets": ["chat"]}}
    )
    first = past_run(saves.parent / "template", spec, falling(200)).path
    yaml, request = ((first / name).read_text(encoding="utf-8") for name in ("spec.yaml", "request.json"))
    for number in range(count):
        folder = saves / f"model-{number % MODELS}" / "lora" / f"run-{number:05d}"
        shutil.copytree(first, folder)
        (folder / "spec.yaml").write_text(yaml.replace("name: first", f"name: run {number}"), encoding="utf-8")
        (folder / "request.json").write_text(request.replace("1000000000.0", str(1e9 + number)), encoding="utf-8")


def whole_process(saves: Path) -> float:
    """Seconds of `python -m engine list`."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "engine", "list", "--saves", str(saves)], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def timed(act: Callable[[], Any]) -> float:
    """Milliseconds per call, the median of several."""
    took = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        act()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def measure(saves: Path) -> list[Figure]:
    empty = saves.parent / "empty"
    empty.mkdir()
    start = min(whole_process(empty) for _ in range(3))
    cold = whole_process(saves)
    warm = statistics.median(whole_process(saves) for _ in range(3))

    import psutil

    from engine.runs import compare, queue, results, runs
    from webui.runs_tab import run_facts, table_html
    from webui.words import Words

    words, process = Words("en"), psutil.Process()
    before = process.memory_info().rss
    runs.find(saves)
    held = (process.memory_info().rss - before) / 2**20
    return [
        Figure("list, no index yet: whole process", cold, "s", 5.0),
        Figure("list, index there: whole process", warm, "s", 1.0),
        Figure("of these: starting Python and importing", start, "s"),
        Figure("one look at all runs", timed(lambda: runs.find(saves)), "ms", 50.0),
        Figure("a tick of the table", timed(lambda: table_html.table(runs.find(saves)[:100], words)), "ms", 50.0),
        Figure("a tick of the queue", timed(lambda: queue.advance(saves)), "ms", 50.0),
        Figure("a search", timed(lambda: [run for run in runs.find(saves) if run_facts.matches(run, "run 77")]), "ms"),
        Figure("all results, for pickers", timed(lambda: results.results(saves)), "ms"),
        Figure(
            "all trainings by name, for Compare",
            timed(lambda: compare.display_names(compare.training_runs(saves))),
            "ms",
        ),
        Figure("memory that the index holds", held, "MiB"),
    ]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    with tempfile.TemporaryDirectory() as folder:
        saves = Path(folder) / "saves"
        build(saves, count)
        time.sleep(3)  # a folder that has just changed is read at each update
        print(f"{count:,} runs\n{table(measure(saves), '')}")


if __name__ == "__main__":
    main()
