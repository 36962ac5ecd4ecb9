"""Open files that someone else may have created, without trusting what they are.

Opening a pipe waits for its other end, a device has no end, and a sparse file takes no disk space but all memory: one
of these in a folder would block everyone who reads the folder. Here each of them is an OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

MAX_BYTES = 64 << 20  # of a file that is read as a whole


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. Raises OSError, also if it is not a regular file."""
    return open(path, "rb", opener=open_descriptor)


def path_of(file: BinaryIO) -> str:
    """Where an open file is, with links resolved: its name may lead elsewhere by now."""
    return os.path.realpath(f"/proc/self/fd/{file.fileno()}")


def append_to_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for appending, and create it if necessary. Raises OSError, also if it is not a regular file."""
    return open(path, "ab", opener=open_descriptor)


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """The whole content of a file. Raises OSError, also if it has more than `limit` bytes."""
    descriptor = open_descriptor(path, os.O_RDONLY)
    try:
        # Its size and one more byte: asking for up to the limit would reserve that much memory each time.
        content = os.read(descriptor, min(os.fstat(descriptor).st_size, limit) + 1)
        while more := os.read(descriptor, min(len(content), limit + 1 - len(content))):  # it is growing
            content += more
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The whole text of a file. Raises OSError as `read_bytes` does, and UnicodeDecodeError if it is not valid text."""
    return read_bytes(path).decode(encoding).replace("\r\n", "\n")


def open_descriptor(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a regular file. Raises OSError, also if it is not one."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # has no effect on a regular file
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def list_folders(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The folders in a folder, including links to folders. Circular links are left out. Empty if the folder cannot be
    listed."""
    return _entries(path, lambda entry: entry.is_dir())


def modification_times(path: str | os.PathLike[str]) -> Iterator[tuple[str, int]]:
    """The names of the folders in a folder, like `list_folders`, and when each was last modified (ns). For thousands of
    folders: their paths are not resolved anew for each."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        yield entry.name, entry.stat().st_mtime_ns
                except OSError:  # a circular link, or deleted in the meantime
                    continue
    finally:
        os.close(descriptor)


def list_files(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The regular files in a folder, like `list_folders`."""
    return _entries(path, lambda entry: entry.is_file())


def _entries(path: str | os.PathLike[str], fits: Callable[[os.DirEntry[str]], bool]) -> list[os.DirEntry[str]]:
    fitting = []
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if fits(entry):
                    fitting.append(entry)
    return fitting
