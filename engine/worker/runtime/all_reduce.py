"""Let several processes add up numbers across their devices, before anything depends on it.

Where each GPU works by itself, the connection between them may still hang, or deliver wrong numbers. A hung NCCL ends
only with its process, so processes of their own try it, and have a time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

# Keep NCCL to main memory and sockets: no copies from GPU to GPU, no InfiniBand.
INDIRECT = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
SIZES = (1 << 10, 1 << 20)  # numbers added up at a time: NCCL sends few of them in another way than many
PERIOD = 251  # of the numbers, so that one in a wrong place is noticed


def all_reduce_failure(
    count: int, backend: str, limit_s: float, variables: Mapping[str, str], *, fork: bool = False
) -> str:
    """Why `count` processes with these variables, each on the device of its number, cannot add up numbers; "" if they
    can. `fork`: they need not import torch, but only if this process has not computed anything with it."""
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    reasons, port = context.SimpleQueue(), _free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, count, backend, port, limit_s, variables, reasons), daemon=True)
        for rank in range(count)
    ]
    deadline = time.monotonic() + limit_s
    for process in ranks:
        process.start()
    try:
        _wait(ranks, deadline)
    finally:
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join(1)  # one that hangs in the driver ends whenever that lets it
    if not reasons.empty():
        return reasons.get()
    if failed := {code for code in codes if code}:
        return f"exit code {', '.join(map(str, failed))}"
    return f"no answer within {limit_s:.0f} s" if None in codes else ""


def _wait(ranks: Sequence[Any], deadline: float) -> None:
    """Until all processes have ended well, one has not, or the time is up."""
    while alive := [process.sentinel for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0 or any(process.exitcode for process in ranks):
            return
        wait(alive, left)


def _rank(
    rank: int, count: int, backend: str, port: int, limit_s: float, variables: Mapping[str, str], reasons: Any
) -> None:
    """One process's part. Why it fails goes into `reasons`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **variables}
    try:
        all_reduce(rank, count, backend, limit_s)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reasons.put(f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__)
        os._exit(1)  # without waiting for a connection that does not work


def all_reduce(rank: int, count: int, backend: str, limit_s: float) -> None:
    """Raises an error if a sum is not that of all processes."""
    import torch

    distributed, device = torch.distributed, f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, rank=rank, world_size=count, timeout=timedelta(seconds=limit_s))
    for size in SIZES:
        base = (torch.arange(size) % PERIOD).float()
        numbers = (base * (rank + 1)).to(device)
        distributed.all_reduce(numbers)
        if not torch.equal(numbers.cpu(), base * (count * (count + 1) / 2)):
            raise ArithmeticError("the sum over all processes is wrong")
    distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
