"""Starts a web server as a user would, waits until it answers, measures its memory, and stops it by its pid."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from engine.launch.workspace import PROJECT

START_TIMEOUT_S = 120
MB = 1e6


class Server:
    """A running server, its address, and the time until it answered."""

    def __init__(self, command: list[str], port: int, folder: Path, path: str = "", **environment: str):
        self.address, self.path = f"http://127.0.0.1:{port}", path
        self.began = time.perf_counter()
        self.output = (folder / "output.txt").open("ab")
        self.process = psutil.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        self.ready_s = time.perf_counter() - self.began

    def _wait(self) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.perf_counter() - self.began < START_TIMEOUT_S and self.process.poll() is None:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                direct.open(self.address + self.path, timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"no answer at {self.address}; see {self.output.name}")

    def tree(self) -> list[psutil.Process]:
        """The process and all its children."""
        return [self.process, *self.process.children(recursive=True)]

    def resident_mb(self) -> float:
        return sum(process.memory_info().rss for process in self.tree()) / MB

    def has_loaded(self, library: str) -> bool:
        """Whether any of its processes has mapped a file of that name."""
        return any(library in Path(f"/proc/{process.pid}/maps").read_text() for process in self.tree())

    def end(self) -> None:
        left = self.tree() if self.process.poll() is None else []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(left, timeout=5)[1]:
            process.kill()
        self.process.wait()
        self.output.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def studio(folder: Path, saves: Path, *flags: str) -> Iterator[Server]:
    """Our studio, with its own saves folder."""
    port = free_port()
    command = [sys.executable, str(PROJECT / "app.py"), "--port", str(port), "--saves", str(saves), *flags]
    server = Server(command, port, folder)
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def peer(folder: Path, python: Path) -> Iterator[Server]:
    """LLaMA-Factory's web UI from the environment of `python`, with all requests to other hosts switched off."""
    port = free_port()
    settings = {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_VERSION_CHECK": "1"}
    server = Server([str(python.parent / "llamafactory-cli"), "webui"], port, folder, **settings, **quiet)
    try:
        yield server
    finally:
        server.end()


def wait_until_quiet(seconds: float = 60) -> bool:
    """Wait until the cores are idle; False if they are not within the timeout."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if psutil.cpu_percent(interval=1.0) < 15:
            return True
    return False
