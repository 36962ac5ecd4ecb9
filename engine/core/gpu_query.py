"""What NVIDIA's management library says of the cards, as JSON on standard
output: {"gpus": [...], "lost": {...}} or {"error": "..."}.

    python engine/core/gpu_query.py

A program of its own, since a driver in trouble can keep its caller waiting for ever. It opens no CUDA context.
"""

from __future__ import annotations

import json
from typing import Any

import pynvml


def answer() -> dict[str, Any]:
    """`gpus` in the order of the PCI bus, as nvidia-smi numbers them, memory in bytes;
    and `lost`, those that do not answer, by index with the reason. Raises NVMLError."""
    pynvml.nvmlInit()
    gpus, lost = [], {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_gpu(index))
        except pynvml.NVMLError as error:  # fallen off the bus, say: the others work
            lost[str(index)] = str(error)
    return {"gpus": gpus, "lost": lost}


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
        "index": index,
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "name": pynvml.nvmlDeviceGetName(handle),
        "memory": memory,
        "free": free,
        "capability": float(f"{major}.{minor}"),
    }


def main() -> None:
    try:
        print(json.dumps(answer()))
    except pynvml.NVMLError as error:
        print(json.dumps({"error": str(error), "library": not isinstance(error, pynvml.NVMLError_LibraryNotFound)}))


if __name__ == "__main__":
    main()
