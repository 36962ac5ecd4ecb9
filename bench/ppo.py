"""The reward that PPO reaches with different seeds: `python -m bench.ppo`.

The toy problem of the tests: a tiny model with random weights is rewarded for the share of its tokens that are in a set
of a tenth of the vocabulary. Prints the mean reward of the first two and the last three batches of answers per seed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figures import Figure, table
from engine.launch.workspace import PROJECT

SEEDS, STEPS = range(5), 60


def learn(model: Path, folder: Path, seed: int) -> tuple[float, float, float]:
    """Mean reward at the beginning and the end, and the seconds including imports."""
    began = time.perf_counter()
    changes = json.dumps({"max_steps": STEPS, "seed": seed})
    words = [sys.executable, "-m", "tests.ppo_toy", "learn", str(model), str(folder), changes]
    output = subprocess.run(words, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    rewards = [line["reward"] for line in json.loads(output.splitlines()[-1])]
    return statistics.mean(rewards[:2]), statistics.mean(rewards[-3:]), time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        model = Path(root) / "tiny"
        subprocess.run([sys.executable, "-m", "tests.tiny_model", str(model)], cwd=PROJECT, check=True)
        results = {seed: learn(model, Path(root) / str(seed), seed) for seed in SEEDS}
    figures = [
        Figure(f"seed {seed}: mean reward, {first:.3f} at first, after {STEPS} steps", last)
        for seed, (first, last, _) in results.items()
    ]
    risen = [last / first for first, last, _ in results.values()]
    figures += [
        Figure("… as a multiple of the first: mean", statistics.mean(risen)),
        Figure("… standard deviation between seeds", statistics.stdev(risen)),
        Figure("… as a share of what is asked, three times: the worst", 3 / min(risen), "", 1),
        Figure("seconds for one, the slowest", max(seconds for *_, seconds in results.values()), "s", 120),
    ]
    print(table(figures, ""))


if __name__ == "__main__":
    main()
