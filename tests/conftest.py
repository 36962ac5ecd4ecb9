"""What the tests share: a tiny real model, a workplace of its own for each test, and patience."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.core.rundir import run_folders
from engine.launch.processes import end_processes
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.models.discovery import SMOLLM2
from engine.spec.run_spec import RunSpec
from tests.forked import forked, not_forked
from tests.hold import hold
from tests.preloaded import run_python

__all__ = ["forked", "hold", "not_forked"]

# Two tests at a time on two cores: a training with two threads would wait for its other thread, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Studios of tests start processes that import torch only where that is what is tested.
os.environ.setdefault("ATHANOR_NO_STANDBY", "1")
os.environ["ATHANOR_CPU_RUNS"] = "1"  # whatever the number of cores
# Leases of GPUs are for the whole machine; each process that tests has a machine of its own.
os.environ["ATHANOR_LEASES"] = tempfile.mkdtemp(prefix="leases-")
atexit.register(shutil.rmtree, os.environ["ATHANOR_LEASES"], ignore_errors=True)
os.fsync = lambda _descriptor: None  # no test cuts the power, and waiting for the disk takes a third of a tiny run
# Hundreds of child processes would each compile the same modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(trylast=True)  # the browser's tests have been marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first: the many short ones then keep both processes busy to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection() -> None:
    gc.disable()  # until all is collected


def pytest_collection_finish() -> None:
    """What has been imported and collected stays to the end: a million objects that no garbage collection finds."""
    gc.collect()
    gc.freeze()
    gc.enable()


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, module: str, *words: str) -> Path:
    """A folder that `python -m module folder words…` has made, once for all processes that test side by side."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = root / f"{name}.partial"
            run_python("-m", module, partial, *words)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model small enough to train in a second, made in a child so that the tests hold no torch."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return shutil.copytree(made_once(tmp_path_factory, "tiny", "tests.tiny_model"), folder)


@pytest.fixture(scope="session")
def demo_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saves folder with two finished runs of the demo model, "one" and "two". To be copied, not to be changed."""
    return made_once(tmp_path_factory, "demo_results", "tests.tiny_adapter", str(DEMO_MODEL), "one", "two")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model that `make smollm2` makes. Tests that need it are skipped where it is not."""
    if not (SMOLLM2 / "model.safetensors").exists():
        pytest.skip("data/models/SmolLM2-135M-Instruct is not there: make smollm2")
    return SMOLLM2


@pytest.fixture(scope="session")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a copy of the installed bitsandbytes that lacks its native libraries."""
    folder = tmp_path_factory.mktemp("path")
    installed = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    shutil.copytree(installed, folder / "bitsandbytes", ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one small data set of each kind."""
    folder = tmp_path / "data"
    folder.mkdir()
    chat = [{"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1}."} for n in range(40)]
    texts = [{"text": f"After {n} comes {n + 1}. " * 5} for n in range(20)]
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    info = {
        "chat": {"file_name": "chat.json"},
        "text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def vllm_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH that has a command vllm: `tests/stand_in_vllm.py`, since vLLM itself needs a card."""
    script = tmp_path_factory.mktemp("bin") / "vllm"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PROJECT}/tests/stand_in_vllm.py" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


@pytest.fixture
def workplace(tmp_path: Path, data: Path, tiny: Path) -> Iterator[Workplace]:
    """Folders of this test's own. Whatever of its runs still lives at the end is ended."""
    saves = tmp_path / "saves"
    saves.mkdir()
    yield Workplace(models=(tiny.parent,), data=data, saves=saves)
    end_runs(saves)


def end_runs(saves: Path) -> None:
    """End whatever still lives of the runs below `saves`, and let nothing more start."""
    for folder in run_folders(saves):
        (folder / "request.json").rename(folder / "withdrawn.json")
        end_processes(folder, kill_timeout_s=0)


@pytest.fixture
def make_spec(workplace: Workplace, tiny: Path) -> Callable[..., RunSpec]:
    """As `short_training`, of the tiny model with the data of the workplace."""
    return partial(short_training, tiny, workplace.data)


def short_training(model: Path, data: Path, /, **changes: Any) -> RunSpec:
    """A spec that trains a small model in seconds; `changes` are paths with `__` for the dot."""
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"datasets": ["chat"], "dataset_dir": str(data), "max_length": 64},
            "training": {
                "max_steps": 8,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
            },
            # The probe and the picture of the loss have tests of their own; here they would cost each run a second.
            "logging": {"logging_steps": 1, "save_steps": 4, "probe": False, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return spec


def wait_until(what: Callable[[], Any], seconds: float = 300, every: float = 0.1) -> Any:
    """The first true answer of `what`; fails the test if there is none in time.

    The time is for a machine that does much else: only what never comes needs all of it. `what` is asked once more
    after it, as this process may have been what had to wait.
    """
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() > deadline
        if answer := what():
            return answer
        assert not late, f"waited {seconds} s in vain"
        time.sleep(every)


def by_hand(model: Path, *adapters: Path | None, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What `tests.ask` says of the model with each adapter (None: without one), in a process that has not trained."""
    printed = run_python("-m", "tests.ask", model, *(one or "-" for one in adapters), input=json.dumps(rows))
    return [json.loads(line) for line in printed.splitlines()[-len(adapters) :]]


def command_line(process: psutil.Process) -> list[str]:
    """Its words; none if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, be it that nobody has asked for its exit code yet."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the two questions
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Its variables; none if it has ended meanwhile."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def flags_of(workplace: Workplace) -> list[str]:
    """The flags that place a studio or a shell command in `workplace`."""
    models = ["--models", *map(str, workplace.models)]
    return [*models, "--data", str(workplace.data), "--saves", str(workplace.saves)]


def engine(workplace: Workplace, *words: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """`python -m engine …` as a person would type it."""
    return subprocess.run(
        [sys.executable, "-m", "engine", *words, *flags_of(workplace)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env=os.environ | {"LANG": "C.UTF-8"},
        **keywords,
    )


def start_studio(
    workplace: Workplace, *flags: str, port: int = 0, **environment: str
) -> tuple[subprocess.Popen[str], str]:
    """The real studio, on any free port if none is given; returns its process and address once it is ready."""
    studio = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), *flags, *flags_of(workplace)],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    line = studio.stdout.readline()
    assert line.startswith("Athanor is at http://"), line
    return studio, line.split()[-1]
