"""Our own programs, forked from a process that has the libraries imported, for tests that look at what they do.

They are the real programs in real processes, with the command line, environment, pipes, locks and signals that they
always have; they only do not import everything anew. Tests of how processes start, what they import and what an
installation lacks start them as the product does, and so is everything started that may quantize.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import read_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.trained_results import trained_result
from engine.export.export_spec import ExportSpec
from engine.launch.command import OFFLINE_VARIABLES, STANDBY_VARIABLE
from engine.launch.handover import PLACE
from engine.preflight import package_checks
from engine.runs import kinds
from engine.worker.evaluate import may_use_quantized
from engine.worker.runtime import optional_packages
from tests.preloaded import (
    LIBRARIES,
    PROJECT,
    REAL_POPEN,
    ForkedProcess,
    forking_process,
    memory_of_words,
    run_python,
    serve,
    starts_of,
)

OUR_MODULES = (
    "trl", "accelerate.commands.launch", "uvicorn", "webui.studio.application", "webui.login", "engine.verbs",
    "engine.worker.training.callbacks", "engine.worker.training.result", "engine.worker.training.trainers",
    "engine.worker.models.loading", "engine.worker.data.examples", "engine.worker.serving.openai_api",
    "engine.worker.serving.server_state", "engine.runs.supervisor",
)  # fmt: skip
LIGHT_PROGRAMS = (
    "app.py", "engine", "engine.data.data_jobs", "engine.documents.generate", "engine.runs.supervisor",
    "engine.worker.prepare",
    "engine.worker.check_ranks", "engine.worker.data.preview", "engine.worker.models.convert",
    "engine.worker.models.image_values", "engine.worker.models.skeleton", "engine.worker.write_script",
    "bench.matrix_rate", "tests.stand_in",
)  # fmt: skip
# Programs that may need bitsandbytes, by the file in their folder that says so.
HEAVY_PROGRAMS = {
    "engine.worker.launch": "spec.yaml",
    "engine.worker.train": "spec.yaml",
    "engine.worker.evaluate": "spec.yaml",
    "engine.worker.export": "spec.yaml",
    "engine.worker.serve": "serve.json",
    "bench.gpu_profile": "spec.yaml",
}
ADDRESS = "ATHANOR_TEST_FORKING"  # a variable: where the forking process is
_address: Path | None = None  # of the forking process


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """Programs that this module starts are forked, and those that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Popen)
        yield


def start_forking_process() -> None:
    """Start the process that this process's programs, and those of its forks, are forked from, unless it has been."""
    global _address
    if _address:
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE_VARIABLES.items():
            patch.setenv(name, value)  # read when the libraries are imported
        _address = forking_process("tests.forked")
    os.environ[ADDRESS] = str(_address)


def fork_programs() -> None:
    """Fork what this process starts: for programs of the tests that do what our own do (`run_forking`)."""
    global _address
    _address = Path(os.environ[ADDRESS])
    subprocess.Popen = Popen  # type: ignore[misc]


def run_forking(*words: object, **options: Any) -> str:
    """`run_python` for a program that calls `fork_programs`."""
    start_forking_process()
    return run_python(*words, **options)


@pytest.fixture
def not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of this test start as ever, in a module whose others are forked."""
    monkeypatch.setattr(subprocess, "Popen", REAL_POPEN)


class Popen(REAL_POPEN):  # type: ignore[type-arg]
    """`subprocess.Popen` that forks our own programs."""

    def __new__(cls, args: Any, *positional: Any, **options: Any) -> Any:
        if not positional and is_forked(args, options):
            start_forking_process()
            return ForkedProcess(args, _address, **options)
        return super().__new__(cls)


def is_forked(args: Any, options: Mapping[str, Any]) -> bool:
    """Whether a command is one of our programs, wants no other modules than are here, and quantizes nothing; and
    whether it can be found as ever, by its command line and environment."""
    words = [os.fspath(word) for word in args if word != "-u"] if isinstance(args, Sequence) else []
    if words[:1] != [sys.executable] or len(words) < 2 or options.get("shell") or options.get("preexec_fn"):
        return False
    if memory_of_words() is None:
        return False
    environment = os.environ if options.get("env") is None else options["env"]
    paths = {*environment.get("PYTHONPATH", "").split(os.pathsep)} - {
        str(start.parent) for start in starts_of(environment)
    }
    program = words[2] if words[1] == "-m" else words[1]
    if paths - {"", str(PROJECT)} or Path(options.get("cwd") or os.getcwd()) != PROJECT:
        return False
    if words[-1] == PLACE and program in HEAVY_PROGRAMS:
        return not json.loads(options["env"][STANDBY_VARIABLE])["quantizes"]
    return program in LIGHT_PROGRAMS or (program in HEAVY_PROGRAMS and not _may_quantize(Path(words[-1]), program))


def _may_quantize(folder: Path, program: str) -> bool:
    file = folder / HEAVY_PROGRAMS[program]
    if file.suffix == ".json":
        return bool(read_json(file)["quantized"])
    spec = kinds.read(file.read_text(encoding="utf-8"))
    if isinstance(spec, EvaluationSpec):
        return may_use_quantized(spec)
    if isinstance(spec, ExportSpec):
        return spec.quantize != "none" or package_checks.quantized(spec.model)
    if judge := trained_result(getattr(spec.stage, "reward_model", "")):
        return package_checks.quantized(judge.spec.model) or package_checks.trains_quantized(
            spec.change("stage.reward_model", "")
        )
    return package_checks.trains_quantized(spec)


def main() -> None:
    """Serve as the process that programs are forked from."""
    global _address
    _address = Path(sys.argv[1])
    optional_packages.hide_unused_packages(quantizes=False)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False"}
    subprocess.Popen = Popen  # type: ignore[misc]
    serve([*LIBRARIES, *OUR_MODULES, "tests.tables"])


if __name__ == "__main__":
    main()
