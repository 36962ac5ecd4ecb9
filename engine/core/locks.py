"""Locks that end with their holder, however it was killed.

Open-file-description locks (Linux): they end with the last process that has the file open; no pid is stored, so none
can be mistaken; and F_OFD_GETLK queries without locking, so a query has no effect on others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

MODE = 0o666  # of the files: the umask decides whether the group, which works in the same folder, can lock them
_FLOCK = struct.Struct("hhqqi4x")


def _record(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def lock_byte(descriptor: int, byte: int, *, shared: bool) -> bool:
    """Lock one byte of an open file; False if someone else holds it.

    The lock lives as long as the descriptor is open here or in a child that inherited it. An exclusive one needs a
    descriptor that can be written to, a shared one that can be read from.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _record(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def unlock_byte(descriptor: int, byte: int) -> None:
    """Release one byte that was locked through this descriptor, and keep the others."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _record(fcntl.F_UNLCK, byte))


def byte_is_locked(descriptor: int, byte: int) -> bool:
    """Whether anyone else holds that byte of an open file, shared or exclusively."""
    return _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _record(fcntl.F_WRLCK, byte)))[0] != fcntl.F_UNLCK


def try_lock(path: Path, byte: int, *, shared: bool) -> int | None:
    """Lock one byte of `path` and return the open descriptor that holds it; None if someone else holds it. The file is
    created if necessary. Raises OSError where the file system has no locks."""
    descriptor, locked = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE), False
    try:
        locked = lock_byte(descriptor, byte, shared=shared)
    finally:
        if not locked:
            os.close(descriptor)
    return descriptor if locked else None


def wait_for_lock(path: Path, byte: int = 0) -> int:
    """Lock one byte of `path` exclusively, waiting as long as necessary. Close the descriptor to release it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _record(fcntl.F_WRLCK, byte))
    except BaseException:  # no locks there, or a signal's exception
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def holding(path: Path, byte: int = 0) -> Iterator[int]:
    """`wait_for_lock`, and its descriptor, for a `with` statement."""
    lock = wait_for_lock(path, byte)
    try:
        yield lock
    finally:
        os.close(lock)


def is_locked(path: Path, byte: int) -> bool:
    """Whether any process holds that byte of `path`, shared or exclusively."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # nobody can hold a missing file; if it cannot be opened, nothing is known
        return False
    try:
        return byte_is_locked(descriptor, byte)
    finally:
        os.close(descriptor)
