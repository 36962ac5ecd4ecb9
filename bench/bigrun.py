"""Creates a run that looks as if it had been logging for weeks: a million points per curve, a gigabyte of log."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path

from engine.core.locks import try_lock
from engine.core.rundir import ALIVE_BYTE, RunDir, write_json, write_text
from engine.launch.workspace import Workplace

LINES = 1_000_000  # of metrics, like those of engine/worker/training/callbacks.py
LOG_BYTES = 10**9
SECONDS_PER_STEP = 0.5
RUN = "bench/lora/weeks"


class BigRun:
    """A run of the demo spec in the training phase. `add` logs one more step, as the trainer would.

    It holds the run's lock as a training process does, until `close`.
    """

    def __init__(self, saves: Path, lines: int = LINES, log_bytes: int = LOG_BYTES, id: str = RUN):
        self.id, self.step, self.total = id, 0, 2 * lines
        self.dir = RunDir(saves / self.id)
        self.dir.path.mkdir(parents=True)
        self.began = time.time() - lines * SECONDS_PER_STEP
        write_text(self.dir.spec, Workplace().default_spec().to_yaml())
        write_json(self.dir.keeper, {"pid": os.getpid(), "started": self.began, "attempt": 1})
        self._write_metrics(lines)
        self._write_log(log_bytes)
        self._report()
        self.lock = try_lock(self.dir.lock, ALIVE_BYTE, shared=True)
        now = {"submitted": self.began, "queued": time.time_ns()}
        write_json(self.dir.request, {"by": "", **now, "attempt": 1, "stop": None})

    def add(self) -> None:
        """One more step: a line of metrics, a line of log, and the progress."""
        with self.dir.metrics.open("a", encoding="utf-8") as file:
            file.write(self._line())
        with self.dir.log.open("a", encoding="utf-8") as file:
            file.write(f"step {self.step} · loss 1.234 · grad_norm 0.9876 · learning_rate 0.0001\n")
        self._report()

    def close(self) -> None:
        os.close(self.lock)

    def _line(self) -> str:
        self.step += 1
        share = self.step / self.total
        values = {
            "step": self.step,
            "epoch": share * 3,
            "time": self.step * SECONDS_PER_STEP,
            "loss": 0.5 + 2 * math.exp(-8 * share) + random.gauss(0, 0.1),
            "grad_norm": random.lognormvariate(0, 0.3),
            "learning_rate": 1e-4 * (1 - share),
            "entropy": 1 + random.gauss(0, 0.05),
            "num_tokens": self.step * 4096.0,
            "mean_token_accuracy": 0.7 + random.gauss(0, 0.02),
        }
        return json.dumps(values) + "\n"

    def _write_metrics(self, lines: int) -> None:
        with self.dir.metrics.open("w", encoding="utf-8") as file:
            for _ in range(lines):
                file.write(self._line())

    def _write_log(self, size: int) -> None:
        # Like a progress bar: states of one line that overwrite each other, then a line of numbers.
        bar = "".join(
            f"\r {n:3}%|{'█' * (n // 10):10}| {n}/100 [00:{n // 2:02}<00:{50 - n // 2:02}]" for n in range(100)
        )
        block = (f"{bar}\nstep · loss 1.234 · grad_norm 0.9876 · learning_rate 0.0001\n" * 64).encode()
        with self.dir.log.open("wb") as file:
            for _ in range(math.ceil(size / len(block))):
                file.write(block)

    def _report(self) -> None:
        write_json(
            self.dir.progress,
            {
                "phase": "training",
                "done": self.step,
                "total": self.total,
                "unit": "steps",
                "began": self.began,
                "began_with": 0,
                "at": time.time(),
            },
        )
