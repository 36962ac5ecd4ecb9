"""The studio's threads share a few arenas of glibc, so that what one has freed is of use to others."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import app
from engine.launch.workspace import PROJECT

# Each thread is given memory of its own while all others live, then glibc writes how many arenas it has made.
LOOK = """
import ctypes, sys, threading
import app

{settle}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ready = threading.Barrier(12)

def hold():
    ready.wait()
    libc.malloc(1000)
    ready.wait()

threads = [threading.Thread(target=hold) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def arenas(settle: str) -> int:
    command = [sys.executable, "-c", LOOK.format(settle=settle)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the call is glibc's")
def test_threads_share_arenas() -> None:
    assert arenas("app.settle_memory()") <= app.ARENAS < arenas("")
