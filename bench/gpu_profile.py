"""Where the time of a training step goes: `python -m bench.gpu_profile FOLDER`, a child of `bench.gpu`.

Trains a run that has been submitted but not started, in this process, with the real code of the worker. After some
steps, PyTorch's profiler watches a few; the seconds of each part of a step are printed as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

from transformers import TrainerCallback

WARMUP_STEPS, PROFILED_STEPS = 3, 3
# Part → what the names of its operations contain. The first part that matches counts.
PARTS = {
    "optimizer": ("_foreach_", "_fused_adam", "adamw"),
    "attention": ("attention", "flash", "varlen"),
    "loss": ("softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "quantization": ("bitsandbytes", "quantize", "gemm_4bit", "int8"),
    "products": ("::mm", "::addmm", "::bmm", "::linear", "::matmul", "::_grouped_mm"),
    "casts and copies": ("::copy_", "::_to_copy", "::to"),
}
WAITING = "enumerate(DataLoader)"  # the range in which the profiler shows the wait for a batch


def part_of(name: str) -> str:
    """The part of a step that an operation belongs to."""
    return next((part for part, words in PARTS.items() if any(word in name.lower() for word in words)), "other")


class ProfileCallback(TrainerCallback):
    """Watches some steps. `parts`: seconds per step, once they are over."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARMUP_STEPS:
            import torch

            self.on_gpu = torch.cuda.is_available()
            activity = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * self.on_gpu])
            self._synchronize()
            self.profiler.start()
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARMUP_STEPS + PROFILED_STEPS:
            self._synchronize()
            seconds = time.perf_counter() - self.began
            self.profiler.stop()
            self.parts = step_parts(self.profiler.key_averages(), seconds, self.on_gpu)

    def _synchronize(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()


def step_parts(averages: Any, seconds: float, on_gpu: bool) -> dict[str, float]:
    """Seconds per step by part; "idle" is what is left of the measured `seconds`, in which a GPU has nothing to do."""
    parts: Counter[str] = Counter()
    for event in averages:
        # Kernels are counted with the operations that started them.
        if "CPU" not in str(event.device_type) or "#" in event.key:
            if WAITING in event.key:
                parts["waiting for data"] += event.cpu_time_total / 1e6
            continue
        parts[part_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    busy = sum(value for part, value in parts.items() if not (on_gpu and part == "waiting for data"))
    each = {part: value / PROFILED_STEPS for part, value in parts.most_common() if value}
    return each | {"idle": max(seconds - busy, 0.0) / PROFILED_STEPS, "step": seconds / PROFILED_STEPS}


def main() -> None:
    from engine.worker.prepare import prepare
    from engine.worker.runtime.process_lifecycle import run_lifecycle
    from engine.worker.train import train
    from engine.worker.training import callbacks

    profile = ProfileCallback()
    loss_watch = callbacks.loss_watch
    callbacks.loss_watch = lambda *words: [*loss_watch(*words), profile]  # type: ignore[list-item]
    with run_lifecycle(sys.argv[1]) as run:
        prepare(run)
        train(run)
    print(json.dumps(profile.parts), flush=True)


if __name__ == "__main__":
    main()
