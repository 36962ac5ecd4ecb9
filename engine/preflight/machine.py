"""What works on this machine and what does not: findings with a level and, for problems, the exact fix.

`python -m engine doctor` and the System tab show the same findings, as they come in. What needs PyTorch is tried in a
child process (`engine.worker.runtime.machine`), so that this process opens no device.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from engine.core import hardware, leases
from engine.core.hardware import Gpu
from engine.core.problems import NOTHING, Problem, say, sentences
from engine.launch import command
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import doctor, idle_gpus
from engine.preflight.package_checks import DEEPSPEED, bitsandbytes_problems, deepspeed_installed

Level = Literal["good", "doubtful", "broken"]
TESTED_PYTHON = ((3, 11), (3, 13))
LOW_MEMORY_BYTES = 8 << 30
LOW_SHARED_MEMORY_BYTES = 1 << 30
LOW_DISK_BYTES, NO_DISK_BYTES = 20 << 30, 1 << 30
FEW_OPEN_FILES = 4096
CHILD_LIMIT_SECONDS = 240.0  # imports alone take a minute over a network file system
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fix` says what to do about a problem, in the requested language."""

    level: Level
    code: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None  # replaces the code's sentence

    def text(self, language: str = "en") -> str:
        return self.problem.text(language) if self.problem else say(self.code, language, **self.values)

    def fix(self, language: str = "en") -> str:
        code = f"{self.code}-fix"
        return say(code, language, **self.values) if code in sentences() and self.level != "good" else ""


def findings(workplace: Workplace, *, hub: bool = False) -> Iterator[Finding]:
    """All findings about this machine, the quick ones first. `hub`: also try to reach the hubs."""
    yield _python()
    yield _packages()
    yield _deepspeed()
    yield _memory()
    yield Finding("good", "machine-cores", {"count": hardware.threads()})
    yield from _shared_memory()
    yield _open_files()
    yield _saves(workplace.saves)
    yield _data(workplace.data)
    yield from _gpus()
    yield from _in_child(hub)
    yield from _bitsandbytes()


def as_text(report: list[Finding], language: str = "en") -> str:
    """The report as text for pasting into a message."""
    signs = {"good": "ok ", "doubtful": "?  ", "broken": "!! "}
    lines = []
    for finding in report:
        lines.append(signs[finding.level] + finding.text(language))
        lines += [f"    → {line}" for line in finding.fix(language).splitlines()]
    return "\n".join(lines)


def _python() -> Finding:
    first, last = TESTED_PYTHON
    tested = first <= sys.version_info[:2] <= last
    version = {"version": platform.python_version()}
    return (
        Finding("good", "machine-python", version)
        if tested
        else Finding("doubtful", "machine-python-untested", version)
    )


def _packages() -> Finding:
    """Installed versions compared with those that were tested together."""
    pins = dict(PIN.findall(_requirements()))
    missing, other = [], []
    for name, tested in pins.items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # +cu130 is the same release
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != tested:
            other.append(f"{name} {installed} ({tested})")
    if missing:
        return Finding("broken", "machine-packages-missing", {"names": ", ".join(missing)})
    if other:
        return Finding("doubtful", "machine-packages-differ", {"names": ", ".join(other)})
    return Finding("good", "machine-packages", {"count": len(pins)})


def _deepspeed() -> Finding:
    """The optional package: without it, its strategies are not offered."""
    if not deepspeed_installed():
        return Finding("good", "machine-deepspeed-missing")
    return Finding("good", "machine-deepspeed", {"version": importlib.metadata.version(DEEPSPEED)})


def _requirements() -> str:
    """As in the checkout; if pip installed Athanor, as in its package metadata."""
    file = PROJECT / "requirements.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        return "\n".join(importlib.metadata.requires("athanor") or ())
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory() -> Finding:
    free, whole = hardware.memory()
    values = {"free": _size(free), "whole": _size(whole)}
    if whole < LOW_MEMORY_BYTES:
        return Finding("doubtful", "machine-memory-small", values)
    return Finding("good", "machine-memory", values)


def _shared_memory() -> Iterator[Finding]:
    if os.path.isdir("/dev/shm"):
        whole = shutil.disk_usage("/dev/shm").total
        small = whole < LOW_SHARED_MEMORY_BYTES
        values = {"size": _size(whole)}
        yield (Finding("doubtful", "machine-shm-small", values) if small else Finding("good", "machine-shm", values))


def _open_files() -> Finding:
    count = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= count < FEW_OPEN_FILES:
        return Finding("doubtful", "machine-files-few", {"count": count})
    return Finding("good", "machine-files", {"count": count if count >= 0 else "∞"})


def _saves(folder: Path) -> Finding:
    if why := _why_not_writable(folder):
        return Finding("broken", "machine-saves-closed", {"folder": folder, "why": why})
    free = hardware.free_disk(folder)
    values = {"free": _size(free), "folder": folder}
    if free < LOW_DISK_BYTES:
        return Finding("broken" if free < NO_DISK_BYTES else "doubtful", "machine-disk-low", values)
    return Finding("good", "machine-disk", values)


def _data(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("broken", "machine-data-missing", {"folder": folder})
    if _why_not_writable(folder):
        return Finding("doubtful", "machine-data-closed", {"folder": folder})
    return Finding("good", "machine-data", {"folder": folder})


def _why_not_writable(folder: Path) -> str:
    """Tested by writing, because permissions do not show a read-only mount. "" if it works."""
    while not folder.exists():  # it will be created
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _gpus() -> Iterator[Finding]:
    if failure := hardware.gpu_failure():
        yield Finding("broken", failure.code, problem=failure)
        return
    for gpu in hardware.gpus():
        yield Finding(
            "good",
            "machine-gpu",
            {
                "index": gpu.index,
                "name": gpu.name,
                "free": _size(gpu.free),
                "memory": _size(gpu.memory),
                "capability": gpu.capability,
            },
        )
    if not hardware.gpus():
        yield Finding("doubtful", "machine-no-gpus")


def _in_child(hub: bool) -> Iterator[Finding]:
    """The findings of child processes that import PyTorch, as they come in. GPUs that somebody uses are left alone, and
    nobody else uses the others meanwhile. A process sees only one slice of a GPU, so each slice has its own."""
    gpus = hardware.gpus()
    if gpus and (unusable := leases.obstacle()):
        yield Finding("broken", unusable.code, problem=unusable)
        gpus = ()
    with idle_gpus.leased(gpus, "engine doctor") as idle:
        yield from map(_not_tried, idle.in_use)
        whole = [gpu for gpu in idle.gpus if not gpu.is_slice]
        yield from _of_child(whole, {"gpus": [gpu.index for gpu in whole], "hub": hub}, idle.descriptors)
        for gpu in idle.gpus:
            if gpu.is_slice:
                yield from _of_child([gpu], {"slice": gpu.index}, idle.descriptors)
    hardware.ask_driver_again()  # somebody may have asked while the children computed


def _not_tried(use: idle_gpus.Use) -> Finding:
    if use.holder:
        return Finding("doubtful", "machine-gpu-leased", {"index": use.gpu.index, "who": use.holder.text})
    pids = ", ".join(str(process.pid) for process in use.gpu.processes) or NOTHING
    values = {"index": use.gpu.index, "size": _size(use.others), "pids": pids}
    return Finding("doubtful", "machine-gpu-others", values)


def _of_child(gpus: Sequence[Gpu], arguments: Mapping[str, Any], descriptors: Sequence[int]) -> Iterator[Finding]:
    """The findings of one child on these GPUs, whose leases the `descriptors` hold."""
    variables = {
        "PYTHONPATH": command.python_path(),
        "PYTHONUTF8": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.cuda_name for gpu in gpus),
    }
    words = [sys.executable, "-m", "engine.worker.runtime.machine", json.dumps(arguments)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            words,
            cwd=PROJECT,
            env=command.inherited_environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            pass_fds=tuple(descriptors),
        )
        limit = threading.Timer(CHILD_LIMIT_SECONDS, _end_session, [child])
        limit.start()
        try:
            yield from _lines(child)
            code = child.wait()
        finally:  # also if nobody reads on
            limit.cancel()
            _end_session(child)
        if code:
            log.seek(0)
            last = next((line for line in reversed(log.read().splitlines()) if line.strip()), f"exit code {code}")
            yield Finding("broken", "machine-child-silent", {"why": last[:300]})


def _end_session(child: subprocess.Popen[str]) -> None:
    """End the child and its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _lines(child: subprocess.Popen[str]) -> Iterator[Finding]:
    assert child.stdout is not None
    for line in child.stdout:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # libraries print, too
            seen = json.loads(line)
            yield Finding(seen["level"], seen["code"], seen["values"])


def _bitsandbytes() -> Iterator[Finding]:
    for device in list(map(doctor.device_for, hardware.gpus())) or [doctor.Device()]:
        problems = bitsandbytes_problems(device, wait=True) or {}
        trial = doctor.trial_result("bitsandbytes", device, wait=True)
        if trial and not trial.certain:
            yield _untested(trial, device)
        elif not problems:
            yield Finding("good", "machine-bitsandbytes", {"device": device.name})
        reasons: dict[str, list[Problem]] = {}
        for problem in problems.values():
            reasons.setdefault(replace(problem, field="", values={**problem.values, "what": ""}).text(), []).append(
                problem
            )
        for alike in reasons.values():
            names = ", ".join(str(problem.values.get("what", "")) for problem in alike)
            first = replace(alike[0], values={**alike[0].values, "what": names})
            yield Finding("broken", first.code, problem=first)


def _untested(trial: doctor.TrialResult, device: doctor.Device) -> Finding:
    """That bitsandbytes may work or not."""
    if doctor.BUSY in trial.failed:
        values = {"device": device.name, "who": trial.failed[doctor.BUSY] or NOTHING}
        return Finding("doubtful", "machine-bitsandbytes-busy", values)
    values = {"device": device.name, "why": trial.failed.get("start", NOTHING)}
    return Finding("doubtful", "machine-bitsandbytes-unknown", values)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
