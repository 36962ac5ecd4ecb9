"""How a run is handed over to a process that was started before there was a run.

Such a process has `PLACE` in its command line or environment where others have the folder of their run. The folder is
written over it in memory, so that the process is found like any other, and the rest arrives over a socket: lines of
JSON, with descriptors.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PLACE = "standby".ljust(1024)  # space for the path of a folder
MAX_DESCRIPTORS = 4  # of one message


def send(channel: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message, with open descriptors. Raises OSError, in particular if nobody can receive it any more."""
    line = json.dumps(message).encode() + b"\n"
    socket.send_fds(channel, [line[:1]], descriptors)
    channel.sendall(line[1:])


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A message and its descriptors. Reads nothing of what follows. Raises EOFError if the other end is closed, OSError
    (such as TimeoutError)."""
    line, descriptors, _, _ = socket.recv_fds(channel, 1, MAX_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # as Python's own; `recv_fds` does not
    byte = line
    while byte != b"\n":
        if not byte:
            raise EOFError
        byte = channel.recv(1)
        line += byte
    return json.loads(line), descriptors


def has_place() -> bool:
    """Whether others see `PLACE` in this process, so that `write_folder` can write over it."""
    return any(_places())


def write_folder(folder: str) -> bool:
    """Write `folder` over each `PLACE` that /proc shows of this process. Returns False if it does not fit."""
    text = os.fsencode(folder)
    if len(text) > len(PLACE):
        return False
    for address in _places():
        ctypes.memmove(address, text.ljust(len(PLACE), b"\0"), len(PLACE))
    return True


def _places() -> Iterator[int]:
    """The addresses of `PLACE` as a whole argument or the whole value of a variable.

    None where the kernel does not reveal them, as in gVisor. See proc(5), fields 48 to 51 of `stat`.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    numbers = [int(field) for field in fields[45:49]]
    whole = PLACE.encode() + b"\0"
    for begin, end in zip(numbers[::2], numbers[1::2], strict=False):
        memory = ctypes.string_at(begin, end - begin)
        at = memory.find(whole)
        while at >= 0:
            yield begin + at
            at = memory.find(whole, at + 1)
