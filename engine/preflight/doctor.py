"""Whether an installed package really works on the device that a run would use.

Only a trial can tell: bitsandbytes without the library for this CUDA can be imported, and fails hours later in the
queue with an obscure message. So it is tried in a child process (`engine.worker.runtime.doctor`), never in this one,
which opens no device. The result is cached in a file until the environment changes, and concurrent callers share one
child.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.hardware import Gpu
from engine.core.locks import wait_for_lock
from engine.core.problems import Problem, problem
from engine.core.rundir import read_json, write_json
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.preflight import idle_gpus
from engine.preflight.suitable_gpus import likely_gpus
from engine.spec.run_spec import Spec

TRIAL_LIMIT_S = 180  # for one trial; imports alone take a minute over a network file system
RETRY_AFTER_S = 600  # how long a trial without a result (no memory, no time) is not repeated
DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
# Variables that decide which library is loaded, in addition to the files themselves.
LIBRARY_VARIABLES = ("BNB_CUDA_VERSION", "BNB_ROCM_VERSION", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_HOME")
REPOSITORY = "https://github.com/bitsandbytes-foundation/bitsandbytes.git"


@dataclass(frozen=True)
class TrialResult:
    """The result of a package's trial. `failed` has a reason for each failed check ("import", "library", "4bit",
    "8bit", "optimizer"); `facts` are versions, PyTorch's CUDA and the shipped libraries. A trial that is not `certain`
    ended without a result, and does not prevent a start. In `failed` is then why: "start", the system's reason why it
    could not be started, or BUSY, who uses the GPU, so that it was left alone ("": programs without a lease)."""

    module: str
    failed: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    certain: bool = True


BUSY = "busy"


@dataclass(frozen=True)
class Device:
    """Where a package is tried: a GPU by its name in CUDA_VISIBLE_DEVICES and its UUID, or the CPU."""

    cuda_name: str = ""
    name: str = "CPU"
    identity: str = "cpu"
    elsewhere: bool = False  # on other machines, where nothing can be tried

    @property
    def kind(self) -> str:
        return "cuda" if self.cuda_name else "cpu"


def device_of(spec: Spec) -> Device:
    """The first device that a run would use."""
    gpus = hardware.planned_gpus()
    if not gpus or command.on_cpu(spec, len(gpus)):
        return Device()
    gpu = (likely_gpus(spec) or gpus)[0]
    return device_for(gpu, elsewhere=hardware.plans_elsewhere())


def device_for(gpu: Gpu, *, elsewhere: bool = False) -> Device:
    """A GPU, or a slice of one, as a place for trials."""
    return Device(gpu.cuda_name, gpu.name, gpu.uuid, elsewhere)


_lock = threading.Lock()
_trials: dict[str, threading.Thread] = {}
_uncertain: dict[str, tuple[float, TrialResult]] = {}  # key → when, and the uncertain result


def trial_result(module: str, device: Device, *, wait: bool) -> TrialResult | None:
    """The result of trying `module` on `device`: from the cache if the environment is the same, otherwise from a new
    trial. Without `wait`, a new trial runs in the background, and None is returned until it has ended. None, too, for a
    device of another machine. On a GPU that somebody uses nothing is tried: the result is uncertain (BUSY)."""
    if device.elsewhere:
        return None
    file = _folder() / f"{_key(module, device)}.json"
    if known := _saved_result(file):
        return known
    for use in filter(None, map(idle_gpus.use_of, _gpus(device))):
        if not _is_check(use):
            return _not_tried(module, use)
    if wait:
        return _try_once(module, device, file)
    with _lock:
        trial = _trials.get(file.name)
        if trial is None or not trial.is_alive():
            trial = threading.Thread(target=_try_once, args=(module, device, file), daemon=True)
            _trials[file.name] = trial
            trial.start()
    return None


def _saved_result(file: Path) -> TrialResult | None:
    since, doubt = _uncertain.get(file.name, (0.0, None))
    if doubt and time.monotonic() - since < RETRY_AFTER_S:
        return doubt
    saved = read_json(file)
    return TrialResult(**saved) if saved else None


def _try_once(module: str, device: Device, file: Path) -> TrialResult:
    """Try the package, unless someone else has in the meantime, and store the result."""
    turn = wait_for_lock(file.with_suffix(".lock"))
    try:
        if known := _saved_result(file):
            return known
        with contextlib.ExitStack() as leasing:
            try:
                idle = leasing.enter_context(idle_gpus.leased(_gpus(device), module))
            except OSError:  # no lease can be taken: the queue and the report say why
                return TrialResult(module, certain=False)
            if idle.in_use:
                return _not_tried(module, idle.in_use[0])
            try:
                seen = _try_in_child(module, device, idle.descriptors)
            except OSError as error:  # no room for temporary files, or no process
                seen = TrialResult(module, {"start": error.strerror or str(error)}, certain=False)
        if seen.certain:
            with contextlib.suppress(OSError):  # on a full disk it is tried again next time
                write_json(file, vars(seen), durable=False)
        else:
            _uncertain[file.name] = (time.monotonic(), seen)
        return seen
    finally:
        os.close(turn)


def _not_tried(module: str, use: idle_gpus.Use) -> TrialResult:
    return TrialResult(module, {BUSY: use.holder.text if use.holder else ""}, certain=False)


def _gpus(device: Device) -> list[Gpu]:
    """The GPU that has to be leased for a trial, if there is one."""
    return [gpu for gpu in hardware.all_gpus() if gpu.uuid == device.identity]


def _is_check(use: idle_gpus.Use) -> bool:
    """Whether it may be this very trial, for whose result another caller can wait."""
    return use.holder is not None and use.holder.kind == idle_gpus.CHECK


def _try_in_child(module: str, device: Device, descriptors: Sequence[int] = ()) -> TrialResult:
    """`descriptors`: what holds the lease of the device, for as long as the child lives."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        variables = {
            "PYTHONPATH": command.python_path(),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "PYTHONUTF8": "1",
            "CUDA_VISIBLE_DEVICES": device.cuda_name,
        }
        with Path(scratch, "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "engine.worker.runtime.doctor", module, device.kind, str(answer)],
                cwd=PROJECT,
                env=command.inherited_environment() | command.OFFLINE_VARIABLES | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=tuple(descriptors),
            )
            try:
                code = child.wait(TRIAL_LIMIT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return TrialResult(module, {"time": str(TRIAL_LIMIT_S)}, certain=False)
            log.seek(0)
            lines = log.read().split("\n")
        if answer_json := read_json(answer):
            return TrialResult(module, **answer_json)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        ended = signal.Signals(-code).name if code < 0 else last[:300]
        # SIGKILL comes from outside: the system ran out of memory, or someone was impatient.
        return TrialResult(module, {"import": ended}, certain=code != -signal.SIGKILL)


# ------------------------------------------------------------------------------------------ what it depends on


def _key(module: str, device: Device) -> str:
    """A value that changes when anything that affects the result does: the files of both packages, driver, device,
    variables."""
    parts = [
        sys.executable,
        device.identity,
        device.cuda_name,
        *(f"{name}={os.environ.get(name)}" for name in LIBRARY_VARIABLES),
    ]
    parts += [*_package_state(module), *_package_state("torch"), _driver_version()]
    return f"{module}-{hashlib.sha256('|'.join(parts).encode(errors='replace')).hexdigest()[:24]}"


def _package_state(module: str) -> list[str]:
    """Place, age and libraries of an installed package, without importing it."""
    place = _package_folder(module)
    if place is None:
        return [f"{module} is missing"]
    seen = []
    for path in sorted([place, *place.glob("*.so*"), *place.glob("*.py")]):
        with contextlib.suppress(OSError):
            status = path.stat()
            seen.append(f"{path}:{status.st_mtime_ns}:{status.st_size}")
    return seen


def _package_folder(module: str) -> Path | None:
    """The folder of a package; None if it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (
        ImportError,
        ValueError,
    ):  # its parent package is broken, or a module was put in its place by hand
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _driver_version() -> str:
    try:
        return DRIVER_VERSION_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@cache
def _folder() -> Path:
    """Where results are cached: with the user's other caches or, without a home folder, in a private folder among the
    temporary files."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for folder in (
        caches / "athanor" / "doctor",
        Path(tempfile.gettempdir(), f"athanor-doctor-{os.getuid()}"),
    ):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="athanor-doctor-"))


def torch_cuda() -> str | None:
    """The CUDA (or ROCm) version that the installed PyTorch was built for; "" for a build without, None if that cannot
    be read."""
    place = _package_folder("torch")
    try:
        text = (place / "version.py").read_text(encoding="utf-8") if place else ""
    except OSError:
        return None
    built = re.findall(r"^(?:cuda|hip)\b[^=\n]*=\s*(?:'([^']*)'|None)", text, re.MULTILINE)
    return next(filter(None, built), "") if built else None


# ------------------------------------------------------------------------------------------ told


def bitsandbytes_problem(seen: TrialResult, why: str, device: Device, setting: str, what: str) -> Problem:
    """The problem that bitsandbytes does not work, with the setting that needs it, the installed versions, and possible
    fixes."""
    facts = seen.facts
    cuda = facts.get("cuda") or "—"
    libraries = facts.get("libraries") or []
    values = {
        "what": what,
        "why": why,
        "device": device.name,
        "torch": facts.get("torch", "?"),
        "cuda": cuda,
        "version": facts.get("version", "?"),
        "libraries": ", ".join(libraries) or "(none)",
        "repository": REPOSITORY,
    }
    if device.kind == "cpu":
        return problem("bitsandbytes-broken-cpu", setting, **values)
    return problem("bitsandbytes-broken", setting, **values, override=_nearest_cuda(cuda, libraries))


def _nearest_cuda(cuda: str, libraries: list[str]) -> str:
    """The digits of the shipped library that is closest to PyTorch's CUDA, preferably of its major version."""
    shipped = [match[1] for name in libraries if (match := re.search(r"_cuda(\d+)", name))]
    major = cuda.partition(".")[0]
    same = [digits for digits in shipped if digits[:-1] == major]
    return max(same or shipped, default=cuda.replace(".", ""), key=int)


def import_problem(seen: TrialResult, setting: str, what: str, package: str) -> Problem:
    """The problem that a package is installed but cannot be imported."""
    return problem("package-broken", setting, what=what, package=package, why=next(iter(seen.failed.values())))
