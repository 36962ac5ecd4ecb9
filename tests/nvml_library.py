"""Installed as pynvml by `tests.nvml`: the functions that engine/core/gpu_query.py calls."""

# ruff: noqa: N801, N802
import json
import pathlib
import time
import types


class NVMLError(Exception): ...


class NVMLError_NotSupported(NVMLError): ...


class NVMLError_LibraryNotFound(NVMLError): ...


class NVMLError_NotFound(NVMLError): ...


class NVMLError_InvalidArgument(NVMLError): ...


class NVMLError_FunctionNotFound(NVMLError): ...


class NVMLError_NoPermission(NVMLError): ...


NVML_TEMPERATURE_GPU = 0
ANSWER = json.loads((pathlib.Path(__file__).parent / "answer.json").read_text())


def _reported(gpu, name):
    if name not in gpu:
        raise NVMLError_NotSupported("not supported")
    return gpu[name]


def nvmlInit():
    time.sleep(ANSWER.get("seconds", 0))
    if "error" in ANSWER:
        raise NVMLError(ANSWER["error"])
    if "missing" in ANSWER:
        raise NVMLError_LibraryNotFound("not found")


def nvmlDeviceGetCount():
    return len(ANSWER["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    return ANSWER["gpus"][index]


def nvmlDeviceGetHandleByUUID(uuid):
    return next(gpu for gpu in ANSWER["gpus"] if gpu["uuid"] == uuid)


def nvmlDeviceGetMemoryInfo(gpu):
    if "lost" in gpu:
        raise NVMLError("GPU is lost")
    total, free = _reported(gpu, "memory"), _reported(gpu, "free")
    return types.SimpleNamespace(total=total, free=free, used=total - free)


def nvmlDeviceGetCudaComputeCapability(gpu):
    return gpu.get("capability", (9, 0))


def nvmlDeviceGetUUID(gpu):
    return gpu["uuid"]


def nvmlDeviceGetName(gpu):
    return gpu.get("name", "NVIDIA H100")


def nvmlDeviceGetUtilizationRates(gpu):
    return types.SimpleNamespace(gpu=_reported(gpu, "utilization"))


def nvmlDeviceGetTemperature(gpu, _sensor):
    return _reported(gpu, "temperature")


def nvmlDeviceGetPowerUsage(gpu):
    return _reported(gpu, "milliwatts")


def nvmlDeviceGetEnforcedPowerLimit(gpu):
    return _reported(gpu, "limit_milliwatts")


def nvmlDeviceGetComputeRunningProcesses(gpu):
    processes = gpu.get("processes", ())
    return [types.SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in processes]


def nvmlDeviceGetMigMode(gpu):
    return (1, 1) if "slices" in gpu else (0, 0)


def nvmlDeviceGetMaxMigDeviceCount(gpu):
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(gpu, number):
    if number >= len(gpu["slices"]):
        raise NVMLError_NotFound("no such slice")
    return gpu["slices"][number]
