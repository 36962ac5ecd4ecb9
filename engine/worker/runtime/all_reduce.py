"""Let several processes add up numbers across their devices, before anything depends on it.

Where each GPU works by itself, the connection between them may still hang, or deliver wrong numbers. A hung NCCL ends
only with its process, so processes of their own try it, and have a time limit. Those of several machines try it
together, and afterwards each machine knows how all of them have fared.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

# Keep NCCL to main memory and sockets: no copies from GPU to GPU, no InfiniBand.
INDIRECT = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
SIZES = (1 << 10, 1 << 20)  # numbers added up at a time: NCCL sends few of them in another way than many
LOOK_SECONDS = 0.2  # between two looks whether another machine has failed
LEAVE_SECONDS = 10.0  # that the first machine waits for the others when all is said
NOTHING = "-"  # a word that says nothing; a store keeps no empty values
PERIOD = 251  # of the numbers, so that one in a wrong place is noticed


class Meeting:
    """Where the machines of a run meet: a store of keys and values at the first of them, which must stay to the end."""

    def __init__(self, limit_s: float, machines: int = 1, machine: int = 0, address: str = "127.0.0.1", port: int = 0):
        """Wait until all `machines` are there, of which this one has the number `machine`. The first listens at
        `address` and `port` (0: any that is free). Raises TimeoutError if one is not there within `limit_s` seconds."""
        from torch.distributed import TCPStore

        self.machines, self.machine, self.address, self.attempts = machines, machine, address, 0
        limit = timedelta(seconds=limit_s)
        try:
            self.store = TCPStore(address, port, is_master=machine == 0, timeout=limit, wait_for_workers=False)
            self._all_say("here", "", limit_s)
        except RuntimeError as error:
            raise TimeoutError(f"{address}:{port}: {_last_line(error)}") from None
        self.port = self.store.port

    def agree(self, why: str, limit_s: float) -> str:
        """Tell the others why this machine has failed in this attempt, "" if it has not → why any machine has."""
        try:
            if why:
                self.store.set(f"failure in {self.attempts}", why)
            answers = self._all_say(f"end of {self.attempts}", why, limit_s + LEAVE_SECONDS)
        except RuntimeError:
            return why or "another machine does not answer any more"
        reasons = [f"machine {number}: {answer}" for number, answer in enumerate(answers, start=1) if answer]
        return "; ".join(reasons) if self.machines > 1 else why

    def another_has_failed(self) -> bool:
        """Whether another machine has already told why it has failed in this attempt."""
        return self.machines > 1 and self.store.check([f"failure in {self.attempts}"])

    def leave(self) -> None:
        """The end of the meeting, for which the first machine waits."""
        with contextlib.suppress(RuntimeError):
            self._all_say("left", "", LEAVE_SECONDS)

    def _all_say(self, what: str, word: str, limit_s: float) -> list[str]:
        """Say a word, and wait for those of all machines."""
        keys = [f"{what} {machine}" for machine in range(self.machines)]
        self.store.set(keys[self.machine], word or NOTHING)
        self.store.wait(keys, timedelta(seconds=limit_s))
        return [self.store.get(key).decode().removeprefix(NOTHING) for key in keys]


def all_reduce_failure(
    count: int,
    backend: str,
    limit_s: float,
    variables: Mapping[str, str],
    *,
    fork: bool = False,
    meeting: Meeting | None = None,
) -> str:
    """Why `count` processes with these variables on each machine of a `meeting` (None: on this one alone), each on the
    device of its number, cannot add up numbers; "" if they can. `fork`: they need not import torch, but only if this
    process has not computed anything with it."""
    meeting = meeting or Meeting(limit_s)
    meeting.attempts += 1
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    reasons, total = context.SimpleQueue(), count * meeting.machines
    place = (meeting.address, meeting.port, f"attempt {meeting.attempts}")
    ranks = [
        context.Process(
            target=_rank,
            args=(meeting.machine * count + number, number, total, backend, limit_s, place, variables, reasons),
            daemon=True,
        )
        for number in range(count)
    ]
    deadline = time.monotonic() + limit_s
    for process in ranks:
        process.start()
    try:
        _wait(ranks, deadline, meeting)
    finally:
        late = time.monotonic() >= deadline
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join(1)  # one that hangs in the driver ends whenever that lets it
    why = f"no answer within {limit_s:.0f} s" if late and None in codes else ""
    if failed := {code for code in codes if code}:
        why = f"exit code {', '.join(map(str, failed))}"
    return meeting.agree(why if reasons.empty() else reasons.get(), limit_s)


def _wait(ranks: Sequence[Any], deadline: float, meeting: Meeting) -> None:
    """Until all processes have ended well, one has not, here or on another machine, or the time is up."""
    while alive := [process.sentinel for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0 or any(process.exitcode for process in ranks) or meeting.another_has_failed():
            return
        wait(alive, left if meeting.machines == 1 else min(left, LOOK_SECONDS))


def _rank(
    rank: int,
    device: int,
    total: int,
    backend: str,
    limit_s: float,
    place: tuple[str, int, str],
    variables: Mapping[str, str],
    reasons: Any,
) -> None:
    """One process's part. Why it fails goes into `reasons`."""
    os.environ |= variables
    try:
        all_reduce(rank, device, total, backend, limit_s, place)
    except Exception as error:
        reasons.put(f"{type(error).__name__}: {_last_line(error)}")
        os._exit(1)  # without waiting for a connection that does not work
    os._exit(0)  # the store that was inherited is not this process's to close


def all_reduce(rank: int, device: int, total: int, backend: str, limit_s: float, place: tuple[str, int, str]) -> None:
    """Raises an error if a sum is not that of all processes. `place`: where their machines meet, and the name of the
    attempt."""
    import torch

    distributed, where = torch.distributed, f"cuda:{device}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)
    (address, port, attempt), limit = place, timedelta(seconds=limit_s)
    meeting = distributed.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
    store = distributed.PrefixStore(attempt, meeting)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=total, timeout=limit)
    for size in SIZES:
        base = (torch.arange(size) % PERIOD).float()
        numbers = (base * (rank + 1)).to(where)
        distributed.all_reduce(numbers)
        if not torch.equal(numbers.cpu(), base * (total * (total + 1) / 2)):
            raise ArithmeticError("the sum over all processes is wrong")
    distributed.destroy_process_group()


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "—"
