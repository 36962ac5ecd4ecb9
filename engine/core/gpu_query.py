"""What NVIDIA's management library says of the cards, as JSON on standard output: {"gpus": [...]} or {"error": "..."}.

    python engine/core/gpu_query.py

A program of its own, since a driver in trouble can keep its caller waiting for ever. It opens no CUDA context.
"""

from __future__ import annotations

import json
from typing import Any

import pynvml


def gpus() -> list[dict[str, Any]]:
    """The cards in the order of the PCI bus, as nvidia-smi numbers them. Memory in bytes. Raises NVMLError."""
    pynvml.nvmlInit()
    return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _gpu(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = free = 0
    try:
        information = pynvml.nvmlDeviceGetMemoryInfo(handle)
        memory, free = information.total, information.free
    except pynvml.NVMLError_NotSupported:  # it shares the memory of the machine
        pass
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return {
        "index": index, "uuid": pynvml.nvmlDeviceGetUUID(handle), "name": pynvml.nvmlDeviceGetName(handle),
        "memory": memory, "free": free, "capability": float(f"{major}.{minor}"),
    }  # fmt: skip


def main() -> None:
    try:
        answer: dict[str, Any] = {"gpus": gpus()}
    except pynvml.NVMLError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
