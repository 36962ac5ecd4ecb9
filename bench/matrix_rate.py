"""How fast a device multiplies large matrices: `python -m bench.matrix_rate cuda|cpu` prints operations per second."""

from __future__ import annotations

import sys
import time

import torch

WARMUP, PRODUCTS = 3, 20


def main() -> None:
    device = sys.argv[1]
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(WARMUP):
        matrix @ matrix
    _wait(device)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        matrix @ matrix
    _wait(device)
    print(PRODUCTS * 2 * size**3 / (time.perf_counter() - began))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
