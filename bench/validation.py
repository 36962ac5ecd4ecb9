"""Time to check a million rows, to open any of them, and to show the first ones as tokens.

Runs as a separate process, `python -m bench.validation FOLDER`, so that nothing else is in the measured memory.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.server import MB, wait_until_quiet
from engine.data import browse, preview_client
from engine.data.datasets import Dataset, find
from engine.data.validation import check
from engine.launch.workspace import PROJECT, Workplace

ROW_COUNT = 1_000_000
DATASET = "million"
WORDS = [
    "apple",
    "river",
    "model",
    "answer",
    "question",
    "language",
    "the",
    "of",
    "a",
    "in",
    "data",
    "train",
    "weight",
    "模型",
    "训练",
    "回答",
    "数据",
    "语言",
    "问题",
    "学习",
    "network",
    "loss",
    "token",
    "sentence",
    "文本",
    "example",
]


def make(folder: Path) -> Dataset:
    """A million Alpaca rows of some 35 words, in English and Chinese, one in a thousand of them bad, one duplicated."""
    draw = random.Random(1)
    with (folder / f"{DATASET}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROW_COUNT):
            row: dict[str, Any] = {
                "instruction": f"{number} {' '.join(draw.choices(WORDS, k=10))}",
                "input": " ".join(draw.choices(WORDS, k=5)) if number % 3 else "",
                "output": " ".join(draw.choices(WORDS, k=20)),
            }
            if number % 1000 == 7:
                del row["output"]
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line * (1 + (number % 1000 == 9)))
    (folder / "dataset_info.json").write_text(json.dumps({DATASET: {"file_name": f"{DATASET}.jsonl"}}))
    return find(folder, DATASET)


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each in a fresh process, and its peak memory."""
    dataset = make(folder)
    wait_until_quiet()

    def seconds(act: Any) -> float:
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    measured = {"page_s": seconds(lambda: browse.page(dataset, ROW_COUNT - 10, 10))}
    measured["again_s"] = seconds(lambda: browse.page(dataset, ROW_COUNT // 2, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    measured["check_s"] = seconds(lambda: check(dataset, "chat"))
    measured["core_s"] = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    measured["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    workplace = Workplace()
    spec = workplace.frozen(workplace.default_spec())
    measured["tokens_s"] = seconds(lambda: preview_client.ask("page", spec, folder, DATASET, first=1, size=5))
    measured["next_s"] = seconds(
        lambda: preview_client.ask("page", spec, folder, DATASET, first=ROW_COUNT // 2, size=5)
    )
    measured["numbers_s"] = seconds(lambda: preview_client.ask("statistics", spec, folder, DATASET))
    return measured


def measure_in_process(folder: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.validation", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
