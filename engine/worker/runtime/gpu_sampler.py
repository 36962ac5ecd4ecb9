"""The load and the memory of a run's GPUs while it trains, as averages between two points of its curves."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import pynvml

from engine.core.hardware import UUIDS_VARIABLE

EVERY_SECONDS = 2.0


class GpuSampler:
    """Asks the driver every few seconds about the GPUs that the run has on this machine.

    It does so in a thread, so that a driver that hangs does not hold up the training.
    """

    def __init__(self) -> None:
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.loads: list[float] = []  # percent, of all GPUs together
        self.memory = 0  # bytes, the most that was used on one GPU

    def start(self) -> None:
        """Begin, if the run has GPUs."""
        uuids = [uuid for uuid in os.environ.get(UUIDS_VARIABLE, "").split(",") if uuid]
        if uuids:
            threading.Thread(target=self._sample, args=(uuids,), daemon=True, name="gpu sampler").start()

    def stop(self) -> None:
        self.stopped.set()

    def take(self) -> dict[str, float]:
        """The values since the last call: `gpu_load` in percent, averaged over GPUs and time, and `gpu_memory` in GB,
        the most on one of them. Empty if the driver has reported nothing."""
        with self.lock:
            loads, memory = self.loads, self.memory
            self.loads, self.memory = [], 0
        values = {"gpu_load": round(sum(loads) / len(loads), 1)} if loads else {}
        return values | ({"gpu_memory": round(memory / 1e9, 2)} if memory else {})

    def _sample(self, uuids: list[str]) -> None:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            gpus = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            while not self.stopped.is_set():
                loads, memory = zip(*map(_read, gpus), strict=True)
                with self.lock:
                    self.loads += [load for load in loads if load is not None]
                    self.memory = max(self.memory, *memory)
                self.stopped.wait(EVERY_SECONDS)


def _read(gpu: Any) -> tuple[float | None, int]:
    """Load in percent and used memory in bytes; None and 0 if they are not reported. A slice has no load of its own."""
    load, memory = None, 0
    with contextlib.suppress(pynvml.NVMLError):
        load = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu).used
    return load, memory
