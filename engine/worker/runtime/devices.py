"""What this process computes on, and in which precision: on all GPUs of the run, and on the CPU only if it has none."""

from __future__ import annotations

import os
import socket

import torch

from engine.core.gpu_choice import BF16_CAPABILITY
from engine.core.hardware import GPUS_VARIABLE
from engine.core.problems import Refusal, problem
from engine.launch.command import PRECISION_VARIABLE


def has_gpus() -> bool:
    """Raises Refusal if PyTorch can use fewer GPUs than the run was given on this machine."""
    count = int(os.environ.get(GPUS_VARIABLE) or 0)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < count:
        raise Refusal(problem("gpus-unusable", "hardware.device", there=there, count=count, machine=_machine()))
    return there > 0


def auto_precision() -> str:
    """What the precision "auto" means: bf16 if the GPUs of the run have it, fp16 on older ones, fp32 on the CPU. All
    processes of the run have the same, which its supervisor has decided on the first machine. Raises Refusal if a GPU
    here cannot compute in it."""
    if not has_gpus():
        return "fp32"
    # is_bf16_supported() also reports emulation on GPUs before Ampere, which is slower than fp16.
    major = {gpu: torch.cuda.get_device_capability(gpu)[0] for gpu in range(torch.cuda.device_count())}
    oldest = min(major, key=lambda gpu: major[gpu])
    own = "bf16" if major[oldest] >= BF16_CAPABILITY else "fp16"
    decided = os.environ.get(PRECISION_VARIABLE) or own
    if decided == "bf16" != own:
        values = {"precision": decided, "name": torch.cuda.get_device_name(oldest), "machine": _machine()}
        raise Refusal(problem("precision-not-there", "training.precision", **values))
    return decided


def _machine() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
