"""Try a package on a device, and record what happens: `python -m engine.worker.runtime.doctor MODULE DEVICE FILE`.

A child of `engine.preflight.doctor`. For bitsandbytes, everything that a run may need of it is done once, on small
tensors: a product of 4-bit weights and one of 8-bit weights with the gradient through it, and a step of an 8-bit
optimizer. Other packages are only imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.rundir import write_json
from engine.worker.runtime.process_lifecycle import silence_warnings

MATRIX_SIZE = 64  # of the matrix: a block of 64 weights is the smallest that is quantized separately
OPTIMIZER_PARAMETERS = 8192  # of a parameter: bitsandbytes keeps the state of smaller ones in 32 bits
REQUIRED_CHECKS = {"import", "library"}  # without these nothing else is tried
MAX_RELATIVE_ERROR = 0.25  # relative error of a correct product; 4 bits have about 0.1


def main(module: str, device: str, file: Path) -> None:
    """Write `failed`, `facts` and `certain`, as in `engine.preflight.doctor.TrialResult`, to `file`."""
    silence_warnings()
    seen: dict[str, Any] = {"failed": {}, "facts": {}}
    checks = BITSANDBYTES if module == "bitsandbytes" else {"import": lambda _: importlib.import_module(module)}
    certain = True
    try:
        if module == "bitsandbytes":
            seen["facts"] = facts()
        for name, check in checks.items():
            if REQUIRED_CHECKS.isdisjoint(seen["failed"]):
                certain &= _run_check(name, check, device, seen["failed"])
    except Exception as error:  # PyTorch itself cannot be imported
        seen["failed"]["import"] = reason(error)
    seen["certain"] = certain
    write_json(file, seen, durable=False)


def _run_check(name: str, check: Callable[[str], Any], device: str, failed: dict[str, str]) -> bool:
    """Whether the check had a result; a failure is added to `failed`."""
    try:
        check(device)
    except Exception as error:
        failed[name] = reason(error)
        return not out_of_memory(error)
    return True


def reason(error: BaseException) -> str:
    """The reason in one line: the first cause, since errors raised from it are about something else."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def out_of_memory(error: Exception) -> bool:
    """Whether the check has no result because other programs fill the GPU."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error)


def facts() -> dict[str, Any]:
    """Versions, PyTorch's CUDA, and the native libraries of bitsandbytes."""
    import torch

    package = importlib.util.find_spec("bitsandbytes")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'bitsandbytes'")
    folder = Path(package.origin).parent
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "folder": str(folder),
        "version": _version(folder),
        "libraries": sorted(path.name for path in folder.glob("libbitsandbytes*")),
    }


def _version(folder: Path) -> str:
    """The version according to the package itself, since a copy has no metadata of its own."""
    version = re.search(r"""__version__ = ["']([^"']+)""", (folder / "__init__.py").read_text(encoding="utf-8"))
    return version[1] if version else "?"


def library(device: str) -> None:
    """Checks that the native library is loaded, and made for the device. Without it, bitsandbytes can be imported, and
    PyTorch compiles its operations one by one on a CPU, if there is a compiler; on a GPU the first one fails."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no card that it can use")
    from bitsandbytes import cextension

    if device == "cpu" and not list(Path(cextension.__file__).parent.glob("libbitsandbytes_cpu*")):
        raise RuntimeError("there is no libbitsandbytes_cpu")
    if why := vars(cextension.lib).get("error_msg"):
        raise RuntimeError(why)
    if device == "cuda" and torch.version.cuda and not getattr(cextension.lib, "compiled_with_cuda", True):
        raise RuntimeError("the library that was loaded is for the CPU alone")


def four_bits(device: str) -> None:
    """A product of NF4 weights, and the gradient of its input."""
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(
        MATRIX_SIZE, MATRIX_SIZE, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    _product(layer, device)


def eight_bits(device: str) -> None:
    """A product of 8-bit weights, and the gradient of its input."""
    import bitsandbytes

    _product(bitsandbytes.nn.Linear8bitLt(MATRIX_SIZE, MATRIX_SIZE, bias=False, has_fp16_weights=False), device)


def _product(layer: Any, device: str) -> None:
    import torch

    whole = layer.weight.data.float().clone()
    layer = layer.to(device)
    inputs = torch.randn(4, MATRIX_SIZE, device=device, requires_grad=True)
    result = layer(inputs)
    result.float().sum().backward()
    right = inputs.detach().cpu() @ whole.T
    away = (result.detach().float().cpu() - right).norm() / right.norm()
    if not away < MAX_RELATIVE_ERROR or inputs.grad is None or not inputs.grad.isfinite().all():
        raise RuntimeError(f"the product is {away:.0%} away from that of the weights")


def optimizer(device: str) -> None:
    """A step of Adam with 8-bit states, which decreases all parameters if all gradients are 1."""
    import bitsandbytes
    import torch

    parameter = torch.nn.Parameter(torch.ones(OPTIMIZER_PARAMETERS, device=device))
    parameter.grad = torch.ones_like(parameter)
    bitsandbytes.optim.AdamW8bit([parameter], lr=0.1).step()
    if not (parameter < 0.95).all():
        raise RuntimeError("a step of the 8-bit optimizer changed nothing")


BITSANDBYTES: dict[str, Callable[[str], Any]] = {
    "library": library,
    "4bit": four_bits,
    "8bit": eight_bits,
    "optimizer": optimizer,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
