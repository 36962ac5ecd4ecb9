"""Test what PyTorch can do on this machine: `python -m engine.worker.runtime.machine '{"gpus": [0], "hub": false}'`.

With `{"slice": 100}`, it tests only a slice of a GPU. A child of `engine.preflight.machine`. Prints a line of JSON for
each finding: its level, the code of its sentence, and values.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import urllib.request
from typing import Any

from engine.worker.runtime.all_reduce import INDIRECT, all_reduce_failure
from engine.worker.runtime.doctor import reason
from engine.worker.runtime.process_lifecycle import silence_warnings

MATRIX_SIZE = 256
MAX_RELATIVE_ERROR = {"fp32": 1e-3, "bf16": 2e-2}  # of a correct product: TF32 and bf16 keep 10 and 7 bits
RANKS_LIMIT_SECONDS = 90.0  # processes that are started anew import PyTorch
HUB_LIMIT_SECONDS = 8.0
MAX_RANKS = 8


def main(gpus: list[int], hub: bool) -> None:
    """Print the findings as they come in; without PyTorch there is nothing else to try."""
    silence_warnings()
    try:
        import torch
    except Exception as error:
        say("broken", "machine-torch-broken", why=reason(error))
        return
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    about = {"version": torch.__version__, "build": build}
    say("good", "machine-torch", **about)
    if gpus and not torch.cuda.is_available():
        say("broken", "machine-torch-no-gpu", **about, why=_why_no_cuda())
        gpus = []
    try_cpu()
    for place, index in enumerate(gpus):
        try_gpu(place, index)
    try_attention()
    try_ranks(len(gpus))
    if hub:
        try_hubs()


def try_slice(index: int) -> None:
    """Try a slice of a GPU, the only one that this process sees."""
    silence_warnings()
    try:
        import torch
    except Exception:  # `main`, in a process of its own, has reported why
        return
    if torch.cuda.is_available():
        try_gpu(0, index)
    else:
        say("broken", "machine-gpu-fails", index=index, why=_why_no_cuda())


def say(level: str, code: str, **values: Any) -> None:
    print(json.dumps({"level": level, "code": code, "values": values}), flush=True)


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return reason(error)
    return "torch.cuda.is_available() is False"


def product_error(device: str, precision: str) -> float:
    """The relative error of a matrix product on a device, compared with double precision on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, generator=generator) for _ in range(2))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    product = (left.to(device, dtype) @ right.to(device, dtype)).to("cpu", torch.float64)
    exact = left.to(dtype).double() @ right.to(dtype).double()
    return float((product - exact).norm() / exact.norm())


def _try_products(device: str, precisions: list[str]) -> None:
    """Raises an error if a product fails or is wrong."""
    for precision in precisions:
        error = product_error(device, precision)
        if not error < MAX_RELATIVE_ERROR[precision]:
            raise ArithmeticError(f"a product in {precision} is off by {error:.1%}")


def try_cpu() -> None:
    precisions = ["fp32", "bf16"]
    try:
        _try_products("cpu", precisions)
    except Exception as error:
        return say("broken", "machine-cpu-fails", why=reason(error))
    return say("good", "machine-cpu-works", precisions=" + ".join(precisions))


def try_gpu(place: int, index: int) -> None:
    """`place` is PyTorch's index of the GPU, `index` nvidia-smi's."""
    import torch

    try:
        major, minor = torch.cuda.get_device_capability(place)
        built = torch.cuda.get_arch_list()
    except Exception as error:
        return say("broken", "machine-gpu-fails", index=index, why=reason(error))
    if not _is_built_for(major, minor, built):
        return say(
            "broken",
            "machine-gpu-unbuilt",
            index=index,
            capability=f"{major}.{minor}",
            built=", ".join(built),
        )
    precisions = ["fp32", "bf16"] if major >= 8 else ["fp32"]
    try:
        _try_products(f"cuda:{place}", precisions)
    except Exception as error:
        return say("broken", "machine-gpu-fails", index=index, why=reason(error))
    say("good", "machine-gpu-works", index=index, precisions=" + ".join(precisions))
    if major < 8:
        say("doubtful", "machine-gpu-no-bf16", index=index)
    return None


def _is_built_for(major: int, minor: int, built: list[str]) -> bool:
    """Code for a capability runs on later ones of the same major version (sm_), or is compiled for any later one
    (compute_)."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdigit, number))
        if len(digits) < 2:
            return True  # another vendor's names
        has = int(digits[:-1]), int(digits[-1])
        if (kind == "sm" and has[0] == major and has[1] <= minor) or (kind == "compute" and has <= (major, minor)):
            return True
    return not built


def try_attention() -> None:
    """The kernels that a model can use."""
    names = ["eager", "sdpa"]
    if importlib.util.find_spec("flash_attn"):
        try:
            importlib.import_module("flash_attn")
            names.append("flash_attention_2")
        except Exception as error:
            say("broken", "machine-attention-broken", why=reason(error))
    say("good", "machine-attention", names=", ".join(names))


def try_ranks(gpu_count: int) -> None:
    """All chosen GPUs add up numbers; without GPUs, two processes on the CPU do. If GPUs cannot, once more without
    direct connections."""
    count, backend = (min(gpu_count, MAX_RANKS), "nccl") if gpu_count > 1 else (2, "gloo")
    values: dict[str, Any] = {"count": count, "backend": backend}
    began = time.monotonic()
    why = all_reduce_failure(count, backend, RANKS_LIMIT_SECONDS, {})
    seconds = f"{time.monotonic() - began:.1f}"
    if not why:
        return say("good", "machine-ranks", **values, seconds=seconds)
    if backend == "nccl" and not all_reduce_failure(count, backend, RANKS_LIMIT_SECONDS, INDIRECT):
        variables = " ".join(f"{name}={value}" for name, value in INDIRECT.items())
        return say("doubtful", "machine-ranks-indirect", **values, why=why, variables=variables)
    return say("broken", "machine-ranks-failed", **values, why=why)


def try_hubs() -> None:
    from huggingface_hub.constants import ENDPOINT

    for address in (ENDPOINT, "https://modelscope.cn"):
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_LIMIT_SECONDS):
                say("good", "machine-hub", address=address)
        except urllib.error.HTTPError:  # it responds, if not with the expected content
            say("good", "machine-hub", address=address)
        except Exception as error:
            say("doubtful", "machine-hub-silent", address=address, why=reason(error))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if "slice" in arguments:
        try_slice(arguments["slice"])
    else:
        main(**arguments)
