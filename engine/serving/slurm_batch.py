"""A chat server in its Slurm job: the batch step, on the job's machine.

    python -m engine.serving.slurm_batch FOLDER

It starts the server with the GPU that Slurm has given to the job, tells it where other machines reach it, and ends it
when Slurm ends the job.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from engine.core import hardware
from engine.core.hardware import Gpu
from engine.core.problems import Refusal
from engine.core.run_errors import write_error
from engine.core.rundir import RunDir, write_json
from engine.launch import command
from engine.launch.machine import missing_gpus
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT
from engine.runs import slurm, slurm_queue
from engine.runs.life import keep_beating
from engine.serving.server import Server
from engine.spec.run_spec import RunSpec

END_SECONDS = 5.0  # for its processes to end by themselves


def serve(server: Server, job: str) -> int:
    """The whole life of the job → its exit code. Does nothing if the server has been unloaded, or has another job."""
    folder = server.folder
    if not _is_wanted(server, job):
        print(f"Job {job} is not needed: {folder.path.name} was unloaded, or has another job.", flush=True)
        return 0
    keep_beating(folder)
    signal.signal(signal.SIGTERM, functools.partial(_end, folder))
    try:
        process = _start(server, job)
    except (Refusal, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the disk is full, or the folder gone
            write_error(folder, error)
        return 1
    code = process.wait()
    end_processes(folder.path, END_SECONDS)  # what one that was killed has left, such as vLLM's
    return code if code >= 0 else 128 - code


def _is_wanted(server: Server, job: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # unloaded at this moment
        return bool(server.settings) and slurm_queue.claim(server.folder, job)
    return False


def _start(server: Server, job: str) -> subprocess.Popen[bytes]:
    """Start the server. Raises Refusal if the job has not got the GPU that it was submitted for."""
    gpus = _gpus(server.settings["slurm"]["gpus"])
    node = os.environ.get("SLURMD_NODENAME", "")
    host = slurm.address_of(node) or socket.gethostname()
    record = {"job": job, "machines": node, "host": host, "listen": address_to_bind(host), "started": time.time()}
    write_json(server.folder.keeper, record)
    return subprocess.Popen(
        [sys.executable, "-m", "engine.worker.serve", str(server.path)],
        cwd=PROJECT,
        env=_environment(server, gpus),
        stdin=subprocess.DEVNULL,
    )


def _gpus(count: int) -> tuple[Gpu, ...]:
    """The GPUs that Slurm has given to the job; none if it was submitted for the CPU. Raises Refusal."""
    if missing := missing_gpus(count, "chat-without-gpu", ""):
        raise Refusal(missing)
    return hardware.gpus()[:count]


def _environment(server: Server, gpus: tuple[Gpu, ...]) -> dict[str, str]:
    spec = RunSpec.read({"model": server.settings["model"]})
    return (
        command.inherited_environment()
        | command.environment(spec, server.path, gpus, hardware.threads())
        | command.OFFLINE_VARIABLES
        | {hardware.GPUS_VARIABLE: str(len(gpus))}
    )


def address_to_bind(host: str) -> str:
    """The address at which other machines reach this one by `host`, its name or address in Slurm. Where the machine
    takes its own name for loopback, as Debian's /etc/hosts has it, the others do not: then it is every address."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    try:
        known = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return "0.0.0.0"
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in known]
    return next((str(address) for address in addresses if not address.is_loopback), "0.0.0.0")


def _end(folder: RunDir, *_: Any) -> None:
    """Slurm ends the job."""
    end_processes(folder.path, END_SECONDS)
    os._exit(143)


if __name__ == "__main__":
    sys.exit(slurm.in_job(lambda folder, job: serve(Server(folder), job)))
