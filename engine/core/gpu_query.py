"""Query NVIDIA's management library for the GPUs and print JSON: {"gpus": [...], "lost": {...}} or {"error": "..."}.

    python engine/core/gpu_query.py

This is a separate program, because a failing driver can block its caller forever. It opens no CUDA context.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pynvml

SLICES_FROM, SLICES_EACH = 100, 10  # the slices of GPU n are numbered from 100 + 10 n


def answer() -> dict[str, Any]:
    """`gpus`: in the order of the PCI bus, as numbered by nvidia-smi, memory in bytes; slices (MIG) instead of the GPU
    that is divided into them. `lost`: GPUs that do not respond, by index with the reason. Raises NVMLError."""
    pynvml.nvmlInit()
    gpus, lost = [], {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus += _devices(index)
        except pynvml.NVMLError as error:  # such as one that has fallen off the bus; the others work
            lost[str(index)] = str(error)
    return {"gpus": gpus, "lost": lost}


def _devices(index: int) -> list[dict[str, Any]]:
    """The GPU with this index, or its slices."""
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    capability = float("{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(gpu)))
    if not (_value(pynvml.nvmlDeviceGetMigMode, gpu) or (0, 0))[0]:
        return [_device(gpu, index, capability)]
    handles = [
        _value(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, number)
        for number in range(_value(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0)
    ]
    first = SLICES_FROM + SLICES_EACH * index
    return [_device(handle, first + number, capability) for number, handle in enumerate(handles) if handle]


def _device(handle: Any, index: int, capability: float) -> dict[str, Any]:
    information = _value(pynvml.nvmlDeviceGetMemoryInfo, handle)  # None: it shares the memory of the machine
    utilization = _value(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power, limit = (
        _value(function, handle)
        for function in (pynvml.nvmlDeviceGetPowerUsage, pynvml.nvmlDeviceGetEnforcedPowerLimit)
    )
    return {
        "index": index,
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "name": pynvml.nvmlDeviceGetName(handle),
        "memory": information.total if information else 0,
        "free": information.free if information else 0,
        "capability": capability,
        "processes": [
            {"pid": process.pid, "memory": process.usedGpuMemory}
            for process in _value(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        ],
        "utilization": utilization.gpu if utilization else None,
        "temperature": _value(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "power": power / 1000 if power is not None else None,
        "power_limit": limit / 1000 if limit is not None else None,
    }


# A slice has no power or temperature of its own, and some GPUs report less than others.
UNKNOWN = (
    pynvml.NVMLError_NotSupported, pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument,
    pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission,
)  # fmt: skip


def _value(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the library returns; None where this GPU does not have it. Raises NVMLError for other
    errors."""
    try:
        return function(*arguments)
    except UNKNOWN:
        return None


def main() -> None:
    try:
        print(json.dumps(answer()))
    except pynvml.NVMLError as error:
        print(json.dumps({"error": str(error), "library": not isinstance(error, pynvml.NVMLError_LibraryNotFound)}))


if __name__ == "__main__":
    main()
