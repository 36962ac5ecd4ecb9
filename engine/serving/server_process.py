"""The process of a chat server on this machine: its folder's first files, the lease of its GPU, its environment.

When a server is started, and with which settings: `engine.serving.servers`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.core import hardware, leases
from engine.core.hardware import Gpu
from engine.core.locks import try_lock
from engine.core.problems import Refusal, problem
from engine.core.rundir import ALIVE_BYTE, write_json
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.serving import server_gpu
from engine.serving.server import Server
from engine.spec.run_spec import RunSpec


def begin(server: Server, settings: Mapping[str, Any], key: str, foreground: bool = False) -> subprocess.Popen[bytes]:
    """Start the process of a server with a new folder. In the `foreground` it prints to this terminal and ends with it;
    otherwise it prints to its log and outlives the process that started it. Raises Refusal if its GPU is taken, and so
    is every other."""
    with contextlib.ExitStack() as closing:
        settings, leased = _leased(server, settings)
        for descriptor in leased:
            closing.callback(os.close, descriptor)
        with new_folder(server):
            # The lock is passed on: the server is alive before it has imported anything.
            lock = try_lock(server.path / "lock", ALIVE_BYTE, shared=True)
            assert lock is not None  # nobody locks this byte exclusively
            closing.callback(os.close, lock)
            write_settings(server, settings, key)
            log = None if foreground else closing.enter_context((server.path / "log.txt").open("ab"))
            return subprocess.Popen(
                [sys.executable, "-m", "engine.worker.serve", str(server.path)],
                cwd=PROJECT,
                env=_environment(settings, server.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=not foreground,
                pass_fds=(lock, *leased),
            )


@contextlib.contextmanager
def new_folder(server: Server) -> Iterator[None]:
    """The folder of a server that is being started; it is removed if that fails."""
    server.path.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(server.path, ignore_errors=True)
        raise


def write_settings(server: Server, settings: Mapping[str, Any], key: str) -> None:
    """Write what to serve into a new folder, and the key if there is one. From now on, others see the server."""
    if key:
        (server.path / "key").touch(0o600)
        (server.path / "key").write_text(key, encoding="utf-8")
    write_json(server.path / "serve.json", settings, durable=False)


def on_gpu(settings: Mapping[str, Any], gpu: Gpu | None) -> dict[str, Any]:
    """The settings of a server on a GPU; None: on the CPU."""
    return {**settings, "card": gpu.index if gpu else None, "gpu": gpu.uuid if gpu else None}


def _leased(server: Server, settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[int]]:
    """The settings of a server, and the descriptors that hold the lease of its GPU, if it has one. If somebody has
    taken the GPU since it was chosen, it gets another. Raises Refusal if there is none."""
    saves, tried = server.path.parents[1], list[str]()
    kind = server_gpu.KINDS[settings["engine"]]
    holder = leases.Holder(settings["name"], kind, by=settings["by"], saves=str(saves), owner=kind)
    while settings["gpu"]:
        descriptors = server_gpu.lease(settings["gpu"], settings["engine"], holder)
        if descriptors is not None:
            return settings, descriptors
        tried.append(settings["gpu"])
        settings = on_gpu(settings, server_gpu.free_gpu(settings, saves, tried))
    return settings, []


def _environment(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Its environment, as for a run on one device: its GPU, or the CPU if there is none."""
    spec = RunSpec.read({"model": settings["model"]})
    gpus = [gpu for gpu in hardware.gpus() if gpu.uuid == settings["gpu"]]
    if settings["gpu"] and not gpus:  # without one, the model would be loaded on the CPU
        raise Refusal(hardware.gpu_failure() or problem("gpu-gone", uuid=settings["gpu"]))
    return (
        command.inherited_environment()
        | command.environment(spec, folder, gpus, hardware.threads())
        | command.OFFLINE_VARIABLES
        | leases.environment(filter(None, [settings["gpu"]]), server_gpu.KINDS[settings["engine"]])
    )
