"""What LLaMA-Factory's page does every two seconds, for a run of the same length. Run with the peer's interpreter:

    PEER_PYTHON bench/peer_tick.py METRICS LOG

converts our log files to its two, and calls the function that its page calls while a run trains.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

TICKS = 3


def make(folder: Path, metrics: Path, log: Path) -> None:
    """The same steps and losses in its format, and the same log."""
    (folder / "running_log.txt").symlink_to(log)
    with (
        metrics.open(encoding="utf-8") as ours,
        (folder / "trainer_log.jsonl").open("w", encoding="utf-8") as theirs,
    ):
        for text in ours:
            line = json.loads(text)
            entry = {
                "current_steps": line["step"],
                "total_steps": 2_000_000,
                "loss": line["loss"],
                "lr": line["learning_rate"],
                "epoch": line["epoch"],
                "percentage": line["step"] / 20_000,
                "elapsed_time": "5 days, 18:53:20",
                "remaining_time": "5 days, 18:53:20",
            }
            theirs.write(json.dumps(entry) + "\n")


def main() -> None:
    from llamafactory.webui.control import get_trainer_info

    with tempfile.TemporaryDirectory() as made:
        make(Path(made), Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
        took = []
        for _ in range(TICKS):
            began = time.perf_counter()
            shown = get_trainer_info("en", made, True)
            took.append(time.perf_counter() - began)
    assert "loss_viewer" in shown[2], "it has drawn no curve"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"tick_ms": statistics.median(took) * 1000, "peak_mb": peak}))


if __name__ == "__main__":
    main()
