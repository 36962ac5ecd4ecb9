"""Keep this process from anything that sending a message does not need, whatever an address makes a library do: no
connections to internal addresses, no programs, no files except those of Python and of this package.

An audit hook of the interpreter sees each of these before it happens, with the IP address that a name has really led
to, after any redirect. It cannot be removed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.project import PROJECT

# How the names of events begin that report programs and changes of files; and those among them that only read.
CHANGES = ("subprocess.", "os.", "pty.", "shutil.", "webbrowser.")
READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.listxattr", "os.getxattr")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CODE_SUFFIXES = (".py", ".pyc", ".so")


class Forbidden(PermissionError):
    """An action that the seal does not permit; `address` if it was a connection."""

    def __init__(self, what: str, address: str = ""):
        super().__init__(f"{what} is not permitted here")
        self.address = address


def seal(permits: Callable[[str], bool]) -> None:
    """From now on, and for ever, connections are made only to IP addresses that `permits`."""
    sys.dont_write_bytecode = True
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(PROJECT / "engine")}
    roots = tuple(f"{Path(folder).resolve()}{os.sep}" for folder in folders)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]
            host = str(address[0]) if isinstance(address, tuple) and address else str(address)
            if not permits(host):
                raise Forbidden(f"a connection to {host}", host)
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and not _is_ours(os.fsdecode(path), flags, roots):
                raise Forbidden("a file")
        elif event.startswith(CHANGES) and event not in READS:
            raise Forbidden(event)

    sys.addaudithook(look)


def _is_ours(path: str, flags: int, roots: tuple[str, ...]) -> bool:
    """Whether a file belongs to Python, its packages or the engine, and is only read."""
    real = os.path.realpath(path)
    return not flags & WRITING and (real.startswith(roots) or real.endswith(CODE_SUFFIXES))
