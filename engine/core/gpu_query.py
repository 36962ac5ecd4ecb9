"""Query NVIDIA's management library for the GPUs and print JSON: {"gpus": [...], "lost": {...}} or {"error": "..."}.

    python engine/core/gpu_query.py

This is a separate program, because a failing driver can block its caller forever. It opens no CUDA context.
"""

from __future__ import annotations

import json
from typing import Any

import pynvml


def answer() -> dict[str, Any]:
    """`gpus`: in the order of the PCI bus, as numbered by nvidia-smi, memory in bytes. `lost`: GPUs that do not
    respond, by index with the reason. Raises NVMLError."""
    pynvml.nvmlInit()
    gpus, lost = [], {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_gpu(index))
        except pynvml.NVMLError as error:  # such as one that has fallen off the bus; the others work
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
